"""A sync through real shared memory fills poisoned targets exactly, and notices every fault."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.protocols import Bucket, Hosted
from miles_lite.rollout.layout import params
from miles_lite.weights.checksum import checksum
from miles_lite.weights.plan import Route, sync_plan
from miles_lite.weights.table import hf_tensors, trainer_layout
from miles_lite.weights.transport import (
    Inbox,
    Slots,
    WeightSyncError,
    bucket_bytes,
    compare,
    pack,
    source_checksums,
)
from tests.weights.test_table import MODEL

BUCKET = 4096
CPU = torch.device("cpu")
TENSORS = hf_tensors(MODEL)


def hf_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator) for t in TENSORS.values()}


def filled(hosted_list: list[Hosted], hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `hosted_list` describes, cut out of HF weights (the independent way)."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for hosted in hosted_list:
        parts = [hf[s.tensor].narrow(hosted.dim, s.start, len(s)) for s in hosted.segments]
        found.setdefault(hosted.param, {})[hosted.index] = torch.cat(parts, hosted.dim).clone()
    return {
        name: pieces[-1] if -1 in pieces else torch.stack([pieces[i] for i in range(len(pieces))])
        for name, pieces in found.items()
    }


def engine_layout(dims: EngineDims) -> list[list[Hosted]]:
    return [
        [hosted for param in params(MODEL, dims, rank) for hosted in param.hosted]
        for rank in range(dims.tp)
    ]


class Cluster:
    """Trainer ranks and engine ranks of one sync, without processes."""

    def __init__(self, trainer: ParallelDims, engine: EngineDims) -> None:
        self.hf = hf_weights()
        layouts = [trainer_layout(MODEL, trainer, rank) for rank in range(trainer.world_size)]
        self.sources = [filled(layout, self.hf) for layout in layouts]
        self.layout = engine_layout(engine)
        self.wanted = [filled(layout, self.hf) for layout in self.layout]
        self.targets = [
            {name: torch.full_like(t, float("nan")) for name, t in wanted.items()}
            for wanted in self.wanted
        ]
        home = list(range(engine.tp))
        self.routes = sync_plan(TENSORS, layouts, self.layout, home, 4, BUCKET)
        self.inboxes = [
            Inbox(
                f"engine rank {rank}",
                target.__getitem__,
                {r.source: r for r in self.routes if r.target == rank},
                torch.float32,
            )
            for rank, target in enumerate(self.targets)
        ]

    def send(self, route: Route, slots: Slots, drop_last: bool = False) -> None:
        buckets = route.buckets[:-1] if drop_last else route.buckets
        for number, copies in enumerate(buckets):
            which = number % 2
            slot = slots.slots[which]
            used = pack(self.sources[route.source].__getitem__, copies, torch.float32, slot)
            bucket = Bucket(slots.handles[which], used)
            self.inboxes[route.target].load(route.source, number, bucket)

    def sync(self) -> None:
        size = max(bucket_bytes(b) for route in self.routes for b in route.buckets)
        assert size <= BUCKET
        slots = Slots(size, CPU)
        try:
            for route in self.routes:
                self.send(route, slots)
        finally:
            slots.close()

    def check(self) -> None:
        for rank, inbox in enumerate(self.inboxes):
            for source, received in inbox.finish().items():
                (route,) = [r for r in self.routes if (r.source, r.target) == (source, rank)]
                sent = source_checksums(
                    self.sources[source].__getitem__, route.copies, torch.float32
                )
                compare(f"engine rank {rank}", route, sent, received)


TRAINERS = [
    ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1),
    ParallelDims(tp=1, pp=1, dp=2, ep=2, expert_tp=1),
    ParallelDims(tp=4, pp=1, dp=1, ep=2, expert_tp=2),
    ParallelDims(tp=2, pp=2, dp=2, ep=2, expert_tp=1),
]
ENGINES = [EngineDims(1, 1, 1), EngineDims(2, 2, 2), EngineDims(4, 2, 4), EngineDims(4, 1, 2)]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("trainer", TRAINERS, ids=str)
def test_poisoned_weights_are_fully_restored(trainer: ParallelDims, engine: EngineDims) -> None:
    if engine.tp > trainer.world_size:
        pytest.skip("engines share the trainer's devices")
    cluster = Cluster(trainer, engine)
    cluster.sync()
    for target, wanted in zip(cluster.targets, cluster.wanted, strict=True):
        for name, tensor in wanted.items():
            assert torch.equal(target[name], tensor), name
    cluster.check()


def test_a_rank_receives_what_it_hosts_and_no_more() -> None:
    cluster = Cluster(TRAINERS[3], ENGINES[2])
    for rank, wanted in enumerate(cluster.wanted):
        received = sum(r.num_bytes for r in cluster.routes if r.target == rank)
        assert received == sum(t.numel() * 4 for t in wanted.values())


def test_a_wrong_byte_is_named() -> None:
    cluster = Cluster(TRAINERS[1], ENGINES[1])
    cluster.sync()
    cluster.targets[1]["layers.0.in_proj"][3, 5] += 1e-6
    with pytest.raises(WeightSyncError, match=r"engine rank 1.*layers\.0\.mixer\.in_proj"):
        cluster.check()


def test_a_lost_bucket_is_named() -> None:
    cluster = Cluster(TRAINERS[1], ENGINES[1])
    slots = Slots(BUCKET, CPU)
    try:
        for route in cluster.routes:
            cluster.send(route, slots, drop_last=route is cluster.routes[0])
    finally:
        slots.close()
    with pytest.raises(WeightSyncError, match="1 of .* buckets .* did not arrive"):
        cluster.check()


def test_a_doubled_bucket_is_refused() -> None:
    cluster = Cluster(TRAINERS[1], ENGINES[1])
    slots = Slots(BUCKET, CPU)
    try:
        cluster.send(cluster.routes[0], slots)
        with pytest.raises(WeightSyncError, match="bucket 0 .* not due"):
            cluster.send(cluster.routes[0], slots)
    finally:
        slots.close()


def test_a_tensor_nobody_hosts_is_named_when_planning() -> None:
    dims = ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1)
    lost = "backbone.layers.0.mixer.D"
    hosted = [h for h in trainer_layout(MODEL, dims, 0) if h.segments[0].tensor != lost]
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.D"):
        sync_plan(TENSORS, [hosted], engine_layout(EngineDims(1, 1, 1)), [0], 4, BUCKET)


def test_checksum_tells_value_order_sign_and_length() -> None:
    x = torch.randn(1000)
    swapped = x.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    negative_zero = torch.zeros(1000)
    negative_zero[7] = -0.0
    seen = {
        checksum(x),
        checksum(x + 1e-7),
        checksum(swapped),
        checksum(x[:-1]),
        checksum(torch.zeros(1000)),
        checksum(negative_zero),
        checksum(torch.zeros(999)),
    }
    assert len(seen) == 7
    assert checksum(x) == checksum(x.clone().view(10, 100))
    assert checksum(x[1:]) == checksum(x[1:].clone())  # a row may begin within a word


def test_checksum_tells_the_order_of_what_it_takes_at_a_time() -> None:
    x = torch.arange(3 << 19, dtype=torch.int32)
    assert checksum(x) != checksum(x.roll(1 << 19))


def test_checksum_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from miles_lite.weights.checksum import checksum;"
        "print(checksum(torch.arange(5000, dtype=torch.float32)))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert int(out.stdout) == checksum(torch.arange(5000, dtype=torch.float32))


def test_another_process_sees_the_slots_and_nothing_stays() -> None:
    """The reader maps what the writer wrote; no file is left where files stay."""
    slots = Slots(64, CPU)
    slots.slots[1].copy_(torch.arange(64, dtype=torch.uint8))
    code = (
        "import torch, sys; "
        "print(torch.from_file(sys.argv[1], shared=True, size=64, dtype=torch.uint8).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(slots.handles[1][0])], capture_output=True, text=True
    )
    assert out.stdout.strip() == str(list(range(64))), out.stderr
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [Path(line.split(maxsplit=5)[-1]) for line in maps if "/dev/shm/" in line]
    slots.close()
    assert not [path for path in mapped if path.exists()]


def test_a_route_is_the_same_in_another_process() -> None:
    routes = Cluster(TRAINERS[3], ENGINES[2]).routes
    assert pickle.loads(pickle.dumps(routes)) == routes
