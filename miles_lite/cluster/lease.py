"""One phase at a time on the shared devices, and what each party holds in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping

from miles_lite.protocols import Metrics, Phase, Resident


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
        for name, kinds in held.items():
            for kind, num_bytes in kinds.items():
                self._held[f"memory/{phase.value}/{name}_{kind}_bytes"] = float(num_bytes)

    def metrics(self) -> Metrics:
        """Bytes held after the latest entry of each phase, and how long the entries took."""
        return dict(self._held)


def total_bytes(parts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    """What several hold together, by kind."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
