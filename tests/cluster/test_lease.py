"""Who shrinks goes first, and what is not given back is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from miles_lite.cluster.lease import Lease
from miles_lite.protocols import Phase

MB = 1 << 20


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


def test_growth_between_steps_is_told_once_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def creeping(phase: Phase, entries: int) -> int:
        return 1000 * MB + (200 * MB if phase is Phase.train and entries > 8 else 0)

    lease = Lease(Party("trainer", [], lambda *_: 500 * MB), Party("rollout", [], creeping))
    for _ in range(6):
        for phase in (Phase.generate, Phase.train):
            lease.enter(phase)
    (record,) = caplog.records
    assert "memory/train/rollout_weights_bytes" in record.getMessage()
    assert lease.metrics()["memory/train/rollout_weights_bytes"] == 1200 * MB


def test_a_step_that_needs_more_now_and_then_is_no_growth(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lease = Lease(
        Party("trainer", [], lambda phase, n: 1000 * MB + (n % 3) * 10 * MB),
        Party("rollout", [], lambda *_: 0),
    )
    for _ in range(9):
        lease.enter(Phase.train)
    assert not caplog.records
