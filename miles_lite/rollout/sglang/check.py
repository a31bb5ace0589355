"""Options checked by SGLang itself, in the interpreter that has it, before anything starts."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_lite.config import Config, ConfigError
from miles_lite.rollout.sglang.launch import environment
from miles_lite.rollout.sglang.model_folder import engine_folder
from miles_lite.rollout.sglang.options import EngineSpec, options

log = logging.getLogger(__name__)

TESTED = "0.5.23"
_INSTALL = (
    "`bash scripts/setup-sglang-cpu.sh` makes .venv-sglang/bin/python, for CPUs; for GPUs `pip "
    f"install sglang=={TESTED}` into an environment of its own and name its python"
)


def check_config(cfg: Config, device: str) -> Mapping[str, Any]:
    """What the engine options of a configuration resolve to. Of the model the config is read."""
    with tempfile.TemporaryDirectory() as folder:
        view = engine_folder(cfg.model.path, Path(folder) / "model")
        return check(EngineSpec.of(cfg, view, device), cfg.cluster.start_timeout_s)


def check(spec: EngineSpec, deadline_s: float) -> Mapping[str, Any]:
    """What the options of an engine resolve to, by name. ConfigError with SGLang's own words if it
    refuses them, or if there is no SGLang. Takes seconds, most of them for importing it."""
    (answer,) = check_all(spec, [options(spec)], deadline_s)
    if "refused" in answer:
        raise ConfigError(f"rollout.engine.sglang: SGLang refuses: {answer['refused']}")
    return answer["resolved"]


def check_all(
    spec: EngineSpec,
    cases: Sequence[Mapping[str, Any]],
    deadline_s: float,
    said: str = "rollout.engine.python =",
) -> list[Mapping[str, Any]]:
    """For each set of options {"resolved": {...}} or {"refused": "why"}, from one process. said:
    where the user names the interpreter."""
    python = spec.python or sys.executable
    if shutil.which(python) is None:
        raise ConfigError(f"{said} {python}: there is no such program; {_INSTALL}")
    try:
        done = subprocess.run(
            (python, "-m", "miles_lite.rollout.sglang.validate"),
            input=json.dumps({"cases": cases, "gpu": spec.device == "cuda"}),
            env=environment(spec),
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{said} {python}: SGLang did not say within {deadline_s:g} s "
            "(cluster.start_timeout_s) what it makes of its options"
        ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        if "No module named 'sglang'" in last[0]:
            raise ConfigError(f"{said} {python} has no sglang; {_INSTALL}")
        raise ConfigError(f"{said} {python} cannot run SGLang: {last[0]}")
    answer = json.loads(done.stdout)
    if answer["version"] != TESTED:
        log.warning("SGLang %s in %s: tested with %s only", answer["version"], python, TESTED)
    return answer["cases"]
