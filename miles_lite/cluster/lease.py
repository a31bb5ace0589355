"""One phase at a time on the shared devices, and what each party holds in it."""

from __future__ import annotations

import logging
import time
from collections import Counter

from miles_lite.protocols import Metrics, Phase, Resident

log = logging.getLogger(__name__)

WARM_ENTRIES = 2  # of a phase, in which allocators and kernels settle
GROWTH_RATIO, GROWTH_BYTES = 1.05, 64 << 20  # more than both together is told


class Lease:
    """Moves trainer and rollout through the phases of a step."""

    def __init__(self, trainer: Resident, rollout: Resident) -> None:
        self._parties = {"trainer": trainer, "rollout": rollout}
        self._phase: Phase | None = None  # None before the first
        self._held: Metrics = {}
        self._usual: Metrics = {}  # the most that was held by the second entry of each phase
        self._entries: Counter[Phase] = Counter()

    def enter(self, phase: Phase) -> None:
        """Whoever shrinks goes first, so that both never need the device at once.

        Entering train the rollout shrinks, and from generate to sync too; else the trainer does
        (from sync to generate it gives its weights back before the caches are made).
        """
        begin = time.perf_counter()
        order = ["trainer", "rollout"]
        if phase is Phase.train or (self._phase, phase) == (Phase.generate, Phase.sync):
            order.reverse()
        self._phase = phase
        for name in order:
            self._parties[name].enter(phase)
        self._held[f"perf/enter_{phase.value}_time"] = time.perf_counter() - begin
        for name, party in self._parties.items():
            for kind, num_bytes in party.held_bytes().items():
                self._watch(phase, f"memory/{phase.value}/{name}_{kind}_bytes", float(num_bytes))
        self._entries[phase] += 1

    def _watch(self, phase: Phase, name: str, num_bytes: float) -> None:
        """What grows from step to step ends a run days later: say so when it begins."""
        self._held[name] = num_bytes
        usual = self._usual.get(name, 0.0)
        if self._entries[phase] < WARM_ENTRIES:
            self._usual[name] = max(usual, num_bytes)
        elif num_bytes > usual * GROWTH_RATIO + GROWTH_BYTES:
            log.warning(
                "%s is %d after %d entries, it was %d at first: something is not given back",
                *(name, num_bytes, self._entries[phase] + 1, usual),
            )
            self._usual[name] = num_bytes  # said once for each growth

    def metrics(self) -> Metrics:
        """Bytes held after the latest entry of each phase, and how long the entries took."""
        return dict(self._held)
