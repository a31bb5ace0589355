"""Inside a reward worker process: load one reward function from its file and grade what is asked.

A worker is a bare Python: it imports the reward file and nothing of the framework (no torch, no
ray). It reads batches of [response, label] from stdin as JSON, one batch a line, and writes one
line [reward, reason] as soon as an answer is graded, so that the parent always knows which one is
in hand. It ends when stdin does, and is killed by the kernel when its parent dies.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MAX_REASON_LEN = 200


def load_reward(file: Path, function: str) -> Callable[..., Any]:
    """The function of that name in a reward file, which may import its neighbours as `.name`.

    The file's folder becomes a package with a private name, so a file called math.py or types.py
    hides nothing. Raises ValueError if the file or the function is missing or unfit.
    """
    file = Path(file).resolve()
    if not file.is_file():
        near = _nearest(file.name, [path.name for path in file.parent.glob("*.py")])
        raise ValueError(f"there is no reward file {file}{near}")
    module = _import_file(file)
    reward = getattr(module, function, None)
    if not callable(reward):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{file} has no function {function!r}{_nearest(function, names)}")
    _check_signature(reward, f"{function} in {file}")
    return reward


def _import_file(file: Path) -> types.ModuleType:
    package = f"miles_rewards_{hashlib.sha256(os.fsencode(file.parent)).hexdigest()[:12]}"
    if package not in sys.modules:
        folder = types.ModuleType(package, "A folder of reward files.")
        folder.__path__ = [str(file.parent)]
        sys.modules[package] = folder
    name = f"{package}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"reward file {file} cannot be imported: {type(error).__name__}: {error}"
            f"{_sibling_hint(file, error)}"
        ) from error
    return module


def _sibling_hint(file: Path, error: Exception) -> str:
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if name and file.with_name(f"{name}.py").is_file():
        return f"; a file beside it is imported with a dot: from .{name} import ..."
    return ""


def _check_signature(reward: Callable[..., Any], where: str) -> None:
    if inspect.iscoroutinefunction(reward):
        raise ValueError(f"{where} is async; a reward is a plain function of (response, label)")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # some built-ins tell no signature
        return
    try:
        signature.bind("response", "label")
    except TypeError as error:
        raise ValueError(
            f"{where} takes {signature}, but a reward takes (response, label)"
        ) from error


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it has {', '.join(sorted(names)[:10])}" if names else ""


def judge(reward: Callable[..., Any], response: str, label: Any) -> tuple[float, str]:
    """(reward, "") of one answer, or (0.0, reason) if there is no verdict."""
    try:
        result = reward(response, label)
    except MemoryError:
        os._exit(1)  # whatever is left of this process cannot be trusted
    except Exception as error:
        _tell_once(reward, error)
        return 0.0, f"error: {type(error).__name__}"
    reason = ""
    if hasattr(result, "reward") and hasattr(result, "reason"):
        result, reason = result.reward, str(result.reason)[:MAX_REASON_LEN]
    if reason:
        return 0.0, reason
    if not isinstance(result, numbers.Real):
        return 0.0, "bad_type"
    try:
        value = float(result)
    except OverflowError:
        return 0.0, "not_finite"
    return (value, "") if math.isfinite(value) else (0.0, "not_finite")


_told: set[type] = set()


def _tell_once(reward: Callable[..., Any], error: Exception) -> None:
    """One line on stderr for the first error of each type; the rest are only counted."""
    if type(error) in _told:
        return
    _told.add(type(error))
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    name = getattr(reward, "__name__", "reward")
    message = str(error)[:MAX_REASON_LEN].encode("ascii", "backslashreplace").decode()
    print(
        f"reward {name}: {type(error).__name__}: {message} ({where})", file=sys.stderr, flush=True
    )


def main(settings: str) -> None:
    """Serve until stdin ends. `settings` is JSON: file, function, parent (pid), memory_bytes."""
    asked = json.loads(settings)
    requests, answers = _take_pipes()
    _die_with(asked["parent"])
    _limit_memory(asked["memory_bytes"])
    try:
        reward = load_reward(Path(asked["file"]), asked["function"])
    except ValueError as error:
        os.write(answers, json.dumps(str(error)).encode() + b"\n")
        return
    os.write(answers, b'""\n')  # ready
    for line in requests:
        for response, label in json.loads(line):
            verdict = json.dumps(judge(reward, response, label))
            os.write(answers, verdict.encode() + b"\n")


def _take_pipes() -> tuple[BinaryIO, int]:
    """Keep stdin and stdout to ourselves: a reward prints to stderr and reads nothing."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    os.dup2(2, 1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return requests, answers


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    if num_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
