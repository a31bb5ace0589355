"""One phase at a time on the shared devices, and what each party holds in it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import psutil

from miles_lite.protocols import Metrics, Phase, Resident

RESIDENT = "resident"  # the kind of `resident_bytes`


class Lease:
    """Moves trainer and rollout through the phases of a step."""

    def __init__(self, trainer: Resident, rollout: Resident) -> None:
        self._parties = {"trainer": trainer, "rollout": rollout}
        self._phase: Phase | None = None  # None before the first
        self._held: Metrics = {}

    def enter(self, phase: Phase) -> None:
        """Whoever shrinks goes first, so that both never need the device at once.

        Entering train the rollout shrinks, and from generate to sync too; else the trainer does
        (from sync to generate it gives its weights back before the caches are made).
        """
        begin = time.perf_counter()
        order = ["trainer", "rollout"]
        if phase is Phase.train or (self._phase, phase) == (Phase.generate, Phase.sync):
            order.reverse()
        held = {name: self._parties[name].enter(phase) for name in order}
        self._phase = phase  # not before: after a failure the same moves are due again
        self._held[f"perf/enter_{phase.value}_time"] = time.perf_counter() - begin
        if "device" in held[order[0]]:  # what all hold there: others have moved since
            held[order[0]] = self._parties[order[0]].held_bytes()
        held["driver"] = {RESIDENT: resident_bytes()}
        for name, kinds in held.items():
            for kind, num_bytes in kinds.items():
                self._held[f"memory/{phase.value}/{name}_{kind}_bytes"] = float(num_bytes)

    def metrics(self) -> Metrics:
        """Bytes held after the latest entry of each phase, and how long the entries took."""
        return dict(self._held)


def total_bytes(parts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    """What several hold together, by kind; of RESIDENT the most that one of them does: in the sum
    over many processes nobody would see that one of them grows."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, num_bytes in part.items():
            before = total.get(kind, 0)
            total[kind] = max(before, num_bytes) if kind == RESIDENT else before + num_bytes
    return total


def resident_bytes(process: psutil.Process | None = None) -> int:
    """Host memory of a process, by default this one, that is its own. Pages that it shares (Ray's
    objects, weights on their way) count as its own outside of Linux, which alone tells them
    apart."""
    held = (process or psutil.Process()).memory_info()
    return held.rss - getattr(held, "shared", 0)
