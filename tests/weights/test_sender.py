"""Weights that must come from another host, relayed between real processes, arrive to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from miles_lite.cluster.rendezvous import open_store
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.protocols import Bucket
from miles_lite.weights.plan import Route, sync_plan
from miles_lite.weights.sender import Sender, SyncReport, itineraries
from miles_lite.weights.table import trainer_layout
from miles_lite.weights.transport import Inbox, compare
from tests.trainer.ranks import World, run_ranks
from tests.weights.test_sync import MODEL, TENSORS, engine_layout, filled, hf_weights

TRAINER = ParallelDims(tp=2, pp=2, dp=1, ep=2, expert_tp=1)
ENGINE = EngineDims(4, 2, 4)


@dataclass
class Here:
    """The engine rank beside this trainer rank, as a remote handle that answers at once."""

    inbox: Inbox

    def start(self, method: str, source: int, number: int, bucket: Bucket) -> Here:
        assert method == "load_bucket"
        self.inbox.load(source, number, bucket)
        return self

    def result(self, deadline_s: float) -> None: ...


class OnAnotherHost:
    def start(self, *_: Any) -> None:
        raise AssertionError("told an engine rank whose memory it cannot share")


def plan() -> tuple[list[Route], list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    hf = hf_weights()
    layouts = [trainer_layout(MODEL, TRAINER, rank) for rank in range(TRAINER.world_size)]
    routes = sync_plan(TENSORS, layouts, engine_layout(ENGINE), [0, 1, 2, 3], 4, 4096)
    return routes, [filled(x, hf) for x in layouts], [filled(x, hf) for x in engine_layout(ENGINE)]


def sync_apart(world: World) -> tuple[SyncReport, dict[int, list[int]]]:
    """Each trainer rank shares memory with the engine rank beside it and with no other."""
    store = open_store("127.0.0.1", world.ports[0], world.rank == 0, 30)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    routes, sources, wanted = plan()
    live = {name: torch.full_like(t, torch.nan) for name, t in wanted[world.rank].items()}
    here = {route.source: route for route in routes if route.target == world.rank}
    inbox = Inbox(f"engine rank {world.rank}", live.__getitem__, here, torch.float32)
    receivers: list[Any] = [OnAnotherHost()] * world.size
    receivers[world.rank] = Here(inbox)
    sender = Sender(world.rank, sources[world.rank].__getitem__, torch.float32, torch.device("cpu"))
    ways = itineraries(routes, ["a", "b", "c", "d"], [0, 1, 2, 3])
    sender.prepare([w for w in ways if world.rank in (w.route.source, w.last)], receivers)
    report = sender.send(30)
    for name, tensor in wanted[world.rank].items():
        assert torch.equal(live[name], tensor), name
    dist.destroy_process_group()
    return report, inbox.finish()


def test_every_engine_rank_is_filled_from_four_hosts() -> None:
    answers = run_ranks(4, sync_apart)
    routes, *_ = plan()
    far = sum(route.num_bytes for route in routes if route.source != route.target)
    assert far > 0
    assert sum(report.relayed_bytes for report, _ in answers) == far
    assert sum(report.num_bytes for report, _ in answers) == sum(r.num_bytes for r in routes)
    for route in routes:
        sent = answers[route.source][0].checksums[route.target]
        compare("engine rank", route, sent, answers[route.target][1][route.source])


def test_memory_is_shared_within_a_host() -> None:
    routes, *_ = plan()
    assert not any(w.relayed for w in itineraries(routes, ["a"] * 4, [0, 1, 2, 3]))
    two_hosts = itineraries(routes, ["a", "a", "b", "b"], [0, 1, 2, 3])
    for way in two_hosts:
        apart = way.route.source // 2 != way.route.target // 2
        assert way.last == (way.route.target if apart else way.route.source)
