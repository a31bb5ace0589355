"""Who shrinks goes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.shared_memory import SharedMemory

from miles_lite.cluster.lease import RESIDENT, Lease, resident_bytes, total_bytes
from miles_lite.protocols import Phase


class Party:
    """Holds what `size` says of the phase and the number of entries so far."""

    def __init__(self, name: str, order: list[str], size: Callable[[Phase, int], int]) -> None:
        self.name, self.order, self.size = name, order, size
        self.entries = 0
        self.now = 0

    def enter(self, phase: Phase) -> Mapping[str, int]:
        self.entries += 1
        self.order.append(self.name)
        self.now = self.size(phase, self.entries)
        return self.held_bytes()

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


class OnADevice(Party):
    """Tells of what everybody holds on it."""

    everybody: list[Party]

    def held_bytes(self) -> Mapping[str, int]:
        return {"weights": self.now, "device": sum(party.now for party in self.everybody)}


def test_what_is_held_is_that_after_both_have_moved() -> None:
    order: list[str] = []
    trainer = OnADevice("trainer", order, lambda phase, _: 7 if phase is Phase.train else 0)
    rollout = Party("rollout", order, lambda phase, _: 5 if phase is Phase.generate else 0)
    trainer.everybody = [trainer, rollout]
    lease = Lease(trainer, rollout)
    for phase in (Phase.sync, Phase.generate, Phase.train):
        lease.enter(phase)
    held = {name: value for name, value in lease.metrics().items() if name.startswith("memory/")}
    for phase in ("sync", "generate", "train"):
        assert held.pop(f"memory/{phase}/driver_resident_bytes") > 10 << 20
    assert held == {
        "memory/sync/trainer_weights_bytes": 0,
        "memory/sync/trainer_device_bytes": 0,
        "memory/sync/rollout_weights_bytes": 0,
        "memory/generate/trainer_weights_bytes": 0,
        "memory/generate/trainer_device_bytes": 5,
        "memory/generate/rollout_weights_bytes": 5,
        "memory/train/trainer_weights_bytes": 7,
        "memory/train/trainer_device_bytes": 7,
        "memory/train/rollout_weights_bytes": 0,
    }


def test_processes_together_hold_the_sum_but_of_resident_memory_the_most_of_one() -> None:
    ranks = [{"weights": 3, RESIDENT: 7}, {"weights": 4, RESIDENT: 5}, {"cache": 1}]
    assert total_bytes(ranks) == {"weights": 7, RESIDENT: 7, "cache": 1}


def test_resident_memory_grows_with_what_is_kept_but_not_with_what_is_shared() -> None:
    before = resident_bytes()
    kept = bytearray(b"x") * (64 << 20)
    own = resident_bytes() - before
    assert len(kept) <= own < len(kept) + (8 << 20)
    shared = SharedMemory(create=True, size=64 << 20)
    try:
        shared.buf[:] = kept
        assert resident_bytes() - before < own + (8 << 20)
    finally:
        shared.close()
        shared.unlink()
