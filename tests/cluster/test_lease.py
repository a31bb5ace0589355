"""Who shrinks goes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from miles_lite.cluster.lease import Lease
from miles_lite.protocols import Phase


class Party:
    """Holds what `size` says of the phase and the number of entries so far."""

    def __init__(self, name: str, order: list[str], size: Callable[[Phase, int], int]) -> None:
        self.name, self.order, self.size = name, order, size
        self.entries = 0
        self.now = 0

    def enter(self, phase: Phase) -> None:
        self.entries += 1
        self.order.append(self.name)
        self.now = self.size(phase, self.entries)

    def held_bytes(self) -> Mapping[str, int]:
        return {"weights": self.now}


def test_who_shrinks_goes_first() -> None:
    order: list[str] = []
    lease = Lease(Party("trainer", order, lambda *_: 0), Party("rollout", order, lambda *_: 0))
    first = []
    for phase in (Phase.sync, Phase.generate, Phase.train, Phase.sync, Phase.generate, Phase.sync):
        order.clear()
        lease.enter(phase)
        first.append(order[0])
    assert first == ["trainer", "trainer", "rollout", "trainer", "trainer", "rollout"]
