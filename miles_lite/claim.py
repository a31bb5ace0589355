"""Whose run folder it is: one process at a time, and one experiment for good."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from miles_lite.config import ConfigError
from miles_lite.records import read_mapping


class RunFinished(Exception):
    """There is nothing left to do for this run."""


def claim(folder: Path, name: str = ".lock") -> IO[str]:
    """Held until it is closed or this process ends, however it ends. name: of the lock's file."""
    file = (folder / name).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(
            f"{folder} is being trained by {file.read().strip() or 'another process'}: wait for "
            "it, or choose another log.name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


# what may differ when a run goes on: it changes where and how long, not what is computed
_FREE = ("parallel.", "rollout.engine.", "sync.", "cluster.", "checkpoint.", "log.", "eval.")
_FREE_KEYS = ("train.num_steps", "train.timeout_s", "rollout.timeout_s", "reward.workers")


def check_same(folder: Path, plain: Mapping[str, Any]) -> None:
    """Raise ConfigError if `folder` holds a run of other settings, RunFinished if it is done."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        before = flat(read_mapping(path))
    except ValueError as error:
        raise ConfigError(f"{error}: choose another log.name") from None
    now = flat(plain)
    refuse_changes(folder, before, now)
    ended = read_mapping(folder / "summary.json").get("outcome")
    if ended == "finished" and now["train.num_steps"] <= before["train.num_steps"]:
        raise RunFinished(
            f"{folder} has finished its {before['train.num_steps']} steps: raise train.num_steps "
            "to go on with it, or choose another log.name"
        )


def refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError unless what `before` says of the experiment is what `now` says."""
    before, now = flat(before), flat(now)
    changed = [
        f"{key} = {now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(_FREE) and key not in _FREE_KEYS
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of other settings, which cannot go on with "
            f"{', '.join(changed[:5])}: put them back, or choose another log.name"
        )


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys."""
    found: dict[str, Any] = {}
    for key, entry in value.items():
        inner = flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {}
        found |= inner or {f"{prefix}{key}": entry}
    return found
