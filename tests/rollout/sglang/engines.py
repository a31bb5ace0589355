"""Real SGLang servers on a CPU, and a stand-in for the trainer that sends them HF weights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from miles_lite.cluster.actor import Remote, call_all, gather
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.protocols import Phase
from miles_lite.rollout.sglang.engine import LOADER, SGLangEngine
from miles_lite.rollout.sglang.layout import Cuts, params
from miles_lite.rollout.sglang.rank import SGLangRank
from miles_lite.types import Completion, Request
from miles_lite.weights.hf import HfCheckpoint
from miles_lite.weights.plan import Route, sync_plan
from miles_lite.weights.sender import Sender, itineraries
from miles_lite.weights.table import hf_tensors, trainer_layout
from miles_lite.weights.transport import compare
from tests.rollout.sglang.servers import START_S, spec

DEADLINE_S = 120.0

Change = Callable[[list[Route]], list[Route]]


@dataclass
class Trainer:
    """One rank that holds a whole HF checkpoint and sends it as trainer ranks do."""

    folder: Path
    engine: SGLangEngine

    def __post_init__(self) -> None:
        model = NemotronH.from_folder(self.folder)
        hosted = trainer_layout(model, ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1), 0)
        checkpoint = HfCheckpoint(self.folder)
        self.live = {h.param: checkpoint.read_hosted(h) for h in hosted}
        targets = self.engine.layout()
        home = [0] * len(targets)
        self.plan = sync_plan(hf_tensors(model), [hosted], targets, home, 4, 1 << 16)
        self._sender = Sender(0, self.live.__getitem__, torch.float32, torch.device("cpu"))
        self._sender.prepare(itineraries(self.plan, ["here"], home), self.engine.receivers())
        self._tell_engine(self.plan)

    def _tell_engine(self, plan: Sequence[Route]) -> None:
        calls = [
            rank.start("set_routes", [route for route in plan if route.target == index])
            for index, rank in enumerate(self.engine.ranks)
        ]
        gather(calls, DEADLINE_S)

    def send(self, version: int, changed: Change = lambda plan: plan) -> int:
        """One sync; returns the bytes sent. changed: what the engine is told the plan is."""
        self._tell_engine(changed(self.plan))
        try:
            self.engine.begin_sync(version)
            report = self._sender.send(DEADLINE_S)
            received = call_all(self.engine.receivers(), "finish_sync", deadline_s=DEADLINE_S)
            for route in self.plan:
                sent = report.checksums[route.target]
                got = received[route.target][route.source]
                compare(self.engine.ranks[route.target].name, route, sent, got)
            self.engine.commit(version)
        finally:
            self._tell_engine(self.plan)
        return report.num_bytes


@contextlib.contextmanager
def started(
    folder: Path, dims: EngineDims, log_folder: Path, **changes: object
) -> Iterator[SGLangEngine]:
    """A server that is up, in a Ray of its own."""
    model = NemotronH.from_folder(folder)
    engine_spec = spec(
        folder,
        dims,
        max_seq_len=256,
        prefill_tokens=1024,
        return_routed_experts=True,
        weight_loaders=(LOADER,),
        **changes,
    )
    held = [params(model, dims, rank, Cuts()) for rank in range(dims.tp)]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
    try:
        actor = ray.remote(SGLangRank).options(num_cpus=0, max_concurrency=4)

        def spawn() -> list[Remote]:
            names = [f"engine 0 rank {rank}" for rank in range(dims.tp)]
            return [
                Remote(name, actor.remote(name, engine_spec, hosted, DEADLINE_S))
                for name, hosted in zip(names, held, strict=True)
            ]

        engine = SGLangEngine("engine 0", spawn, (model, held), engine_spec, log_folder, DEADLINE_S)
        try:
            engine.connect(["127.0.0.1"] * dims.tp, START_S)
            yield engine
        finally:
            engine.close()
    finally:
        ray.shutdown()


def serving(engine: SGLangEngine, trainer: Trainer, version: int) -> None:
    """Through the phases of a step, to where it answers with the trainer's weights."""
    engine.enter(Phase.train)
    engine.enter(Phase.sync)
    trainer.send(version)
    engine.enter(Phase.generate)


def ask(engine: SGLangEngine, requests: Sequence[Request]) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*map(engine.generate, requests))

    return asyncio.run(all_of_them())
