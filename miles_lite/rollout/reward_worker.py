"""Inside the reward zygote and the workers it forks: load reward functions, grade what is asked.

The zygote is a bare Python: it imports the reward files and nothing heavy of ours (no torch, no
ray), then forks a worker whenever it is told to. A worker reads batches of questions from a pipe
as JSON, one batch a line, and writes one line with the [reward, reason] of every answer of a
question as soon as it is graded, so that the parent always knows which one is in hand. After a
question that took long it asks whether to go on with the batch. It ends with its pipe, or with the
zygote, which ends with the parent. It grades in its main thread, so a library may use signals.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import random
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from miles_lite.log import SafeStream, printable, say
from miles_lite.orphan import adopt_orphans, die_with
from miles_lite.rollout.reward_limits import limit_cpu, limit_memory, refuse_network

MAX_REASON_LEN = 200
MAX_ERROR_LEN = 10_000
LONG_S = 0.05  # then others may have taken over the rest of a batch
GO_ON, DROP = b"go on\n", b"drop\n"


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function, ready to be called."""

    call: Callable[..., Any]  # (response or responses, label, ...) with its options bound
    by_group: bool  # takes all responses of a group at once
    wants: tuple[str, ...]  # of EXTRAS
    network: bool = False  # its file says NETWORK = True


EXTRAS = ("prompt", "metadata")  # what a function may ask for besides response and label


def load_reward(file: Path, function: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The function of that name in a reward file, which may import its neighbours as `.name`.

    The file's folder becomes a package with a private name, so a file called math.py or types.py
    hides nothing. Raises ValueError if the file or the function is missing or unfit.
    """
    file = Path(file).resolve()
    if not file.is_file():
        near = _nearest(file.name, [path.name for path in file.parent.glob("*.py")])
        raise ValueError(f"there is no reward file {file}{near}")
    module = _import_file(file)
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{file} has no function {function!r}{_nearest(function, names)}")
    reward = _bound(found, f"{function} in {file}", dict(options or {}))
    return replace(reward, network=bool(getattr(module, "NETWORK", False)))


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


def _bound(function: Callable[..., Any], where: str, options: dict[str, Any]) -> Reward:
    """With options bound. Raises ValueError for options or a signature that do not fit."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{where} is async; a reward is a plain function of (response, label)")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins tell no signature
        return Reward(functools.partial(function, **options), False, ())
    names = list(signature.parameters)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    for option in options:
        if option not in names[2:] and not takes_all:
            raise ValueError(
                f"{where} takes no option {option!r} (reward.options){_nearest(option, names[2:])}"
            )
    wants = tuple(name for name in EXTRAS if name in names[2:] and name not in options)
    try:
        signature.bind("response", "label", **dict.fromkeys(wants), **options)
    except TypeError as error:
        raise ValueError(
            f"{where} takes {signature}, but a reward takes (response, label), besides prompt or "
            f"metadata, and options that reward.options must give: {error}"
        ) from error
    by_group = bool(names) and names[0] == "responses"
    return Reward(functools.partial(function, **options), by_group, wants)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it has {', '.join(sorted(names)[:10])}" if names else ""


Result = tuple[float, str]  # (reward, "") or, without a verdict, (0.0, reason)


def judge(reward: Reward, responses: Sequence[str], label: Any, extras: dict) -> list[Result]:
    """One result for each response: of the one that there is, or of a group judged as a whole."""
    try:
        answer = reward.call(list(responses) if reward.by_group else responses[0], label, **extras)
        results = list(answer) if reward.by_group else [answer]
    except MemoryError:
        os._exit(1)  # whatever is left of this process cannot be trusted
    except Exception as error:
        _tell_once(reward.call, error)
        return [(0.0, f"error: {type(error).__name__}")] * len(responses)
    if len(results) != len(responses):
        return [(0.0, f"bad_count: {len(results)}")] * len(responses)
    return [_result(value) for value in results]


def _result(value: Any) -> Result:
    """From a number, or from an object with .reward and .reason."""
    reason = ""
    if hasattr(value, "reward") and hasattr(value, "reason"):
        value, reason = value.reward, str(value.reason)[:MAX_REASON_LEN]
    if reason:
        return 0.0, reason
    if not isinstance(value, numbers.Real):
        return 0.0, "bad_type"
    try:
        number = float(value)
    except OverflowError:
        return 0.0, "not_finite"
    return (number, "") if math.isfinite(number) else (0.0, "not_finite")


_told: set[type] = set()


def _tell_once(reward: Callable[..., Any], error: Exception) -> None:
    """One line on stderr for the first error of each type; the rest are only counted."""
    if type(error) in _told:
        return
    _told.add(type(error))
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    name = getattr(getattr(reward, "func", reward), "__name__", "reward")
    message = printable(str(error)[:MAX_REASON_LEN])
    say(f"reward {name}: {type(error).__name__}: {message} ({where})", sys.stderr)


def main(settings: str) -> None:
    """The zygote: fork until stdin, a socket, ends. `settings` is JSON: functions ({name: [file,
    function, options]}), parent (pid), memory_bytes, timeout_s. The first message is [pid, what the
    functions are, who keeps them off the network], or an error."""
    asked = json.loads(settings)
    control = socket.socket(fileno=os.dup(0))
    die_with(asked["parent"])
    _silence()
    try:
        rewards = {
            name: load_reward(Path(file), function, options)
            for name, (file, function, options) in asked["functions"].items()
        }
    except ValueError as error:
        control.send(json.dumps(str(error)[:MAX_ERROR_LEN]).encode())
        return
    about = {name: [reward.by_group, reward.wants] for name, reward in rewards.items()}
    asks = sorted(name for name, reward in rewards.items() if reward.network)
    weakness = "" if asks else refuse_network()
    control.send(json.dumps([os.getpid(), about, weakness]).encode())
    gc.freeze()  # workers share its pages for good
    adopt_orphans()
    forked, own = set[int](), _children()
    while message := socket.recv_fds(control, 64, 2):
        word, pipes, *_ = message
        if not word:
            break
        if word == b"fork":
            control.send(b"%d" % _fork(control, pipes, rewards, forked, asked))
        else:
            _kill(forked, int(word.removeprefix(b"kill ")))
            _end_orphans(forked | own)
    for pid in tuple(forked):
        _kill(forked, pid)
    _end_orphans(own)
    os._exit(0)  # no exit handler of a reward's library may keep it


def _fork(
    control: socket.socket,
    pipes: Sequence[int],
    rewards: Mapping[str, Reward],
    forked: set[int],
    limits: Mapping[str, Any],
) -> int:
    """Process id of a new worker; the worker itself does not return."""
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        forked.add(pid)
        for pipe in pipes:
            os.close(pipe)
        return pid
    try:
        os.setsid()  # killing its group kills what it started
        die_with(zygote)
        control.close()
        random.seed()
        limit_memory(limits["memory_bytes"])
        _grade(os.fdopen(pipes[0], "rb"), pipes[1], rewards, 2 * limits["timeout_s"])
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception:
        traceback.print_exc()
    finally:  # also where a reward calls sys.exit
        os._exit(0)


def _grade(requests: BinaryIO, answers: int, rewards: Mapping[str, Reward], cpu_s: float) -> None:
    """cpu_s: for one question; beyond the time limit, so that this is the last resort."""
    for line in requests:
        for name, responses, label, extras in json.loads(line):
            limit_cpu(cpu_s)
            begin = time.monotonic()
            results = judge(rewards[name], responses, label, extras)
            took_long = time.monotonic() - begin > LONG_S
            os.write(answers, json.dumps([results, took_long]).encode() + b"\n")
            if took_long and requests.readline() != GO_ON:
                break


def _kill(forked: set[int], pid: int) -> None:
    """Its number cannot belong to another process before we have waited for it."""
    if pid not in forked:
        return
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    forked.discard(pid)


def _end_orphans(known: set[int]) -> None:
    """What left its worker's process group and lost its parent is ours now: none is to stay."""
    while orphans := _children() - known:
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _children() -> set[int]:
    found = set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def _silence() -> None:
    """A reward reads nothing, and prints to stderr what no terminal obeys."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    plain = os.fdopen(os.dup(2), "wb", 0)
    sys.stdout = sys.stderr = SafeStream(plain, "utf-8", "backslashreplace", write_through=True)
