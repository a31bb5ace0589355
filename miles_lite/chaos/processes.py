"""What the processes below a supervised run are, by the names that they have for everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

KINDS = ("engine", "trainer", "driver", "reward", "node", "gcs")  # node: Ray's raylet
_ACTORS = {
    "ray::MegatronWorker": "trainer",
    "ray::EngineRank": "engine",
    "ray::SGLangRank": "engine",
}
_RAY = {"raylet/raylet": "node", "gcs/gcs_server": "gcs"}
_PHASES = {
    "start": "__init__ listen connect follow setup load hosted",
    "generate": "submit poll cancel abort",
    "train": "step refresh_reference",
    "sync": "prepare_sync send_weights set_routes load_bucket finish_sync set_version checksums",
    "save": "save finish_save score digests",
    "export": "export_hf",
    "change": "enter held_bytes",  # from one phase to the next
}  # by the methods of actors
_PHASE_OF = {method: phase for phase, methods in _PHASES.items() for method in methods.split()}


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a run."""

    process: psutil.Process
    kind: str  # one of KINDS
    method: str  # that it runs just now; "" if none


def members(root: psutil.Process) -> list[Member]:
    """Of the run whose supervisor is `root`, whatever lives below it."""
    commands = {root.pid: [""]}
    found = []
    for process in root.children(recursive=True):  # parents before their children
        try:
            commands[process.pid] = process.cmdline() or [""]
            parent = commands.get(process.ppid(), [""])
        except psutil.Error:
            continue
        if kind := kind_of(commands[process.pid], parent):
            method = commands[process.pid][0].strip().partition(".")[2]
            is_actor = commands[process.pid][0].startswith("ray::")
            found.append(Member(process, kind, method if is_actor else ""))
    return found


def kind_of(command: Sequence[str], parent: Sequence[str]) -> str:
    """One of KINDS; "" for what is none of them. parent: the command of its parent."""
    title, before = (words[0].strip().partition(".")[0] for words in (command, parent))
    if title in _ACTORS:
        return _ACTORS[title] if title != before else ""  # what it forked has its title
    for path, kind in _RAY.items():
        if command[0].endswith(path):
            return kind
    if [*command[1:4]] == ["-m", "miles_lite.cli", "train"] and "--supervise" not in command:
        return "driver"
    if _is_reward(command) and _is_reward(parent):  # forked by the zygote
        return "reward"
    return ""


def _is_reward(command: Sequence[str]) -> bool:
    return len(command) > 2 and "miles_lite.rollout.reward_worker" in command[2]


def phase(found: Sequence[Member]) -> str:
    """Of the loop, as the methods tell that run just now; "driver" when none does."""
    running: Mapping[str, str] = {m.kind: m.method for m in found if m.method}
    if not any(m.kind in ("trainer", "engine") for m in found):
        return "start"
    method = running.get("trainer") or running.get("engine", "")
    return _PHASE_OF.get(method, method) or "driver"
