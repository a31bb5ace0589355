"""What a step costs the driver, at up to 1,024 ranks.

    python tools/bench/scale.py [--ranks 32 128 1024] [--tokens 1024] [--json FILE]

Simulated: the driver is the real one, with its TrainerGroup, RolloutManager, embedded engines'
clients, reward workers, packing, sync plan, sample files and checkpoint probe, through a real Ray.
What it calls is fake: a few actors stand for all ranks, 256 to each, and answer at once with what
a rank would send back (answers of `--tokens` random tokens, per-token log-probs, checksums). So the
driver's calls, objects and answers are as many and as large as they would be; what is missing is
that 1,024 processes connect to one Ray, and that ranks take time. One answer a rank, the layout and
engines of the Ultra recipe on as many hosts; with `--model` another model's weights are planned.

CPU seconds are the driver process's alone and hardly depend on who else uses the machine. Bytes are
what Ray serializes in the driver: `put` objects, arguments of calls, results fetched, answers.

"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import ray
from ray._private.worker import global_worker

from miles_lite import build, resume
from miles_lite.algo.credit import CreditSettings, rollout_metrics, to_sequences
from miles_lite.algo.packing import PackSettings, pack, packing_metrics
from miles_lite.cluster.actor import Remote
from miles_lite.compose import compose
from miles_lite.config import Config
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.metrics import ABS_DIFF, Mean
from miles_lite.models.flops import train_flops
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.engine import EmbeddedEngine
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.manager import RolloutManager
from miles_lite.rollout.sglang.layout import Cuts, params
from miles_lite.rollout.signal import SignalWatch
from miles_lite.run import Run
from miles_lite.trainer.group import TrainerGroup
from miles_lite.trainer.megatron.messages import RankReport, WorkerSpec
from miles_lite.types import Completion, Finish, Prompt, Request
from miles_lite.weights.plan import Route
from miles_lite.weights.sender import Itinerary, SyncReport

T = TypeVar("T")
PROJECT = Path(__file__).parents[2]
BLOCK = 32  # ranks of a pipeline of tensor groups, and of an engine, as in the Ultra recipe
PER_ACTOR = 256  # ranks that one actor stands for
NUM_METRICS = 40  # of a rank that computes losses
AT_ONCE = 4  # answers of an engine that one poll brings
WORDS = 96  # ids of the tiny vocabulary that are text


class FakeRanks:
    """Many trainer and engine ranks in one process. They answer at once."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._ways: dict[int, list[tuple[int, int, int]]] = {}  # target, copies, bytes: of a sender
        self._routes: dict[int, list[tuple[int, int]]] = {}  # source, copies: of an engine rank
        self._asked: dict[int, list[Request]] = {}
        self._version = 0

    def ask(self, rank: int, method: str, args: Sequence[Any]) -> Any:
        return getattr(self, method)(rank, *args)

    def noop(self, rank: int, *_: Any) -> None: ...

    setup = connect = save = finish_save = submitted = abort = noop

    def listen(self, rank: int, host: str) -> str:
        return f"{host}:1"

    def held_bytes(self, rank: int, *_: Any) -> dict[str, int]:
        return {"weights": 1 << 30, "grads": 0, "optimizer": 0}

    enter = held_bytes

    # --- trainer

    def step(self, rank: int, share: Any, reports: bool) -> RankReport:
        """share: in a list of its own, so that Ray passes its reference. As in a run, all ranks of
        a pipeline and tensor group get it and one of them reports."""
        if not reports:
            return RankReport({"perf/log_probs_time": Mean(1.0, 1.0)}, {}, {})
        updates = _fetched(share)
        values = {
            s.sample: np.full(s.response_len, -0.5, np.float32)
            for update in updates
            for micro_batch in update
            for s in micro_batch.sequences
        }
        names = ["perf/actor_train_time", ABS_DIFF, *(f"m{i}" for i in range(NUM_METRICS))]
        return RankReport(dict.fromkeys(names, Mean(1.0, 1.0)), values, values)

    def score(self, rank: int, share: Any, reports: bool) -> dict[int, np.ndarray]:
        if not reports:
            return {}
        return {
            s.sample: np.full(s.response_len, -0.5, np.float32)
            for micro_batch in _fetched(share)
            for s in micro_batch.sequences
        }

    def digests(self, rank: int, folder: Path, files: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(files, "0" * 32)

    def prepare_sync(self, rank: int, mine: Sequence[Itinerary], receivers: Sequence[Any]) -> None:
        own = [way.route for way in mine if way.route.source == rank]
        self._ways[rank] = [(r.target, len(r.copies), r.num_bytes) for r in own]

    def send_weights(self, rank: int) -> SyncReport:
        ways = self._ways[rank]
        sums = {target: [1 << 62] * copies for target, copies, _ in ways}
        return SyncReport(sums, sum(way[2] for way in ways), 0, 1.0, {})

    # --- engine

    def set_routes(self, rank: int, routes: Sequence[Route]) -> None:
        self._routes[rank] = [(route.source, len(route.copies)) for route in routes]

    def finish_sync(self, rank: int) -> dict[int, list[int]]:
        return {source: [1 << 62] * copies for source, copies in self._routes[rank]}

    def set_version(self, rank: int, version: int) -> None:
        self._version = version

    def submit(self, rank: int, requests: Sequence[Request]) -> None:
        self._asked.setdefault(rank, []).extend(requests)

    def num_steps(self, rank: int) -> int:
        return 1

    def poll(self, rank: int, max_wait_s: float) -> list[tuple[int, Completion]]:
        """All answers are as long as they may be, and differ."""
        asked = self._asked.get(rank, [])
        now, self._asked[rank] = asked[:AT_ONCE], asked[AT_ONCE:]
        if not now:
            time.sleep(0.001)
        return [(request.uid, self._answer(request.sampling.max_new_tokens)) for request in now]

    def _answer(self, length: int) -> Completion:
        tokens = self._rng.integers(128 - WORDS, 128, length).tolist()
        logprobs = (-self._rng.random(length)).astype(np.float32).tolist()
        return Completion(tuple(tokens), tuple(logprobs), self._version, Finish.length)


def _fetched(share: Sequence[Any]) -> Any:
    return ray.get(share[0]) if isinstance(share[0], ray.ObjectRef) else share[0]


# ------------------------------------------------------------------ what the driver holds of them


class Traffic:
    """Bytes that Ray serializes in this process, while they are counted, which takes time."""

    def __init__(self) -> None:
        self.on = False
        self.bytes: Counter[str] = Counter()

    def add(self, kind: str, value: Any) -> None:
        if self.on:
            context = global_worker.get_serialization_context()
            self.bytes[kind] += context.serialize(value).total_bytes

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        put, get = ray.put, ray.get

        def counted_put(value: Any) -> Any:
            self.add("put", value)
            return put(value)

        def counted_get(refs: Any, **how: Any) -> Any:
            found = get(refs, **how)
            if not isinstance(refs, list):
                self.add("results", found)
            return found

        self.on, self.bytes = True, Counter()
        ray.put, ray.get = counted_put, counted_get
        try:
            yield
        finally:
            self.on = False
            ray.put, ray.get = put, get


@dataclasses.dataclass(frozen=True)
class FakeHandle:
    """Of one rank, in the place of an actor's."""

    actor: Any
    rank: int
    reports: bool  # of a trainer rank: whether it tells of its samples

    def __reduce__(self) -> Any:
        return tuple, ((self.actor, self.rank),)  # whoever gets one calls nobody

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=partial(self._remote, method))

    def _remote(self, method: str, *given: Any) -> Any:
        TRAFFIC.add("arguments", given)
        if method in ("step", "score"):  # a reference stays one
            given = ([given[0]], self.reports)
        return self.actor.ask.remote(self.rank, method, given)


TRAFFIC = Traffic()


@dataclasses.dataclass
class Prompts:
    """Implements protocols.PromptStream."""

    tokens: tuple[int, ...]
    dealt: int = 0

    def take(self, n: int) -> list[Prompt]:
        self.dealt += n
        uids = range(self.dealt - n, self.dealt)
        return [Prompt(f"p:{uid}", self.tokens, "question", "1", "", {}) for uid in uids]

    def put_back(self, n: int) -> None:
        self.dealt -= n

    def state(self) -> Mapping[str, Any]:
        return {}


class FakeEngine(EmbeddedEngine):
    """The real client; what it says of its ranks is what SGLang's of the recipe would host."""

    held: Sequence[Any] = ()

    def layout(self) -> Any:
        return self.held

    async def generate(self, request: Request) -> Completion:
        completion = await super().generate(request)
        TRAFFIC.add("answers", completion)
        return completion


# ------------------------------------------------------------------ a step, stage by stage


class Stages:
    """Seconds of this process and of the clock, by stage, of several rounds."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)


def simulate(
    num_ranks: int, tokens: int, recipe: Path, rounds: int, folder: Path
) -> dict[str, Any]:
    planned = NemotronH.from_folder(recipe)
    tiny = NemotronH.from_folder(PROJECT / "configs/model/tiny")
    dp = num_ranks // BLOCK
    dims = ParallelDims(tp=8, pp=BLOCK // 8, dp=dp, ep=min(32, 8 * dp), expert_tp=1)
    cfg = run_config(num_ranks, dims, tokens, folder)
    stages = Stages()
    num_actors = -(-num_ranks // PER_ACTOR)
    actors: list[Any] = [
        ray.remote(FakeRanks).options(num_cpus=0).remote() for _ in range(num_actors)
    ]
    ray.get([actor.noop.remote(0) for actor in actors])
    last_stage = [dims.pp_rank(r) == dims.pp - 1 and dims.tp_rank(r) == 0 for r in range(num_ranks)]
    workers = [
        Remote(f"trainer rank {r}", FakeHandle(actors[r // PER_ACTOR], r, last_stage[r]))
        for r in range(num_ranks)
    ]
    spec = worker_spec(cfg, recipe, dims)
    hosts = [f"host {r // 8}" for r in range(num_ranks)]
    with stages("start"):
        trainer = TrainerGroup(workers, hosts, spec, 256 << 20, 600)
        engines = fake_engines(num_ranks, actors, tiny, planned)
    inputs = build.Inputs(tiny, ChatTokenizer.load(cfg.model.path), (), {}, sampling(cfg, tiny))
    prompts = Prompts(tuple(range(40, 90)))
    with build.reward_workers(cfg.reward) as rewards:
        rollout = RolloutManager(engines, rewards, inputs.tokenizer, build._rollout(cfg, inputs))
        parts = SimpleNamespace(trainer=trainer, rollout=rollout, prompts=prompts)
        parts.packing = PackSettings.of(cfg, partial(train_flops, tiny))
        with stages("plan the sync"):
            trainer.send_weights(rollout, 0)
        with Run.open(cfg, datetime.now()) as run:
            for number in range(rounds):
                one_step(number, stages, cfg, parts, run)
            with TRAFFIC.counted():
                one_step(rounds, Stages(), cfg, parts, run)
    for actor in actors:
        ray.kill(actor)
    return {
        "ranks": num_ranks,
        "answers": num_ranks,
        "tokens": num_ranks * tokens,
        "cpu_s": {name: statistics.median(each) for name, each in stages.cpu.items()},
        "wall_s": {name: statistics.median(each) for name, each in stages.wall.items()},
        "bytes": dict(TRAFFIC.bytes),
        "bytes_per_token": TRAFFIC.bytes.total() / (num_ranks * tokens),
    }


def one_step(number: int, stages: Stages, cfg: Config, parts: Any, run: Run) -> None:
    """The loop of train.py, its stages timed. Needs no device."""
    trainer, rollout = parts.trainer, parts.rollout
    with stages("phases, three"):
        for phase in (Phase.generate, Phase.train, Phase.sync):
            trainer.enter(phase)
            rollout.enter(phase)
    with stages("generate"):
        drawn = rollout.generate(parts.prompts)
    with stages("credit, metrics"):
        credit = CreditSettings.of(cfg)
        sequences = to_sequences(drawn.groups, credit)
        metrics = rollout_metrics(drawn.groups, sequences, credit)
    with stages("pack"):
        batch = pack(sequences, parts.packing)
        packing_metrics(batch, parts.packing)
    with stages("train"):
        result = trainer.step(batch)
    with stages("sync"):
        trainer.send_weights(rollout, number + 1)
    with stages("log, sample file"):
        run.log(number, metrics | result.metrics)
        run.save_samples(number, drawn.groups, result, sequences)
        run.settle()  # a run does so beside the next rollout
    with stages("checkpoint"):
        watch = SignalWatch(10)
        resume.save(number + 1, run, parts, watch, sequences, metrics | result.metrics)


def run_config(num_ranks: int, dims: ParallelDims, tokens: int, folder: Path) -> Config:
    words = ["experiment=tiny", f"log.folder={folder}", f"rollout.max_response_tokens={tokens}"]
    words += [f"rollout.num_prompts={num_ranks // 8}", "rollout.samples_per_prompt=8"]
    words += [f"train.global_batch={num_ranks}", "algo.train_zero_advantage=true"]
    words += ["reward.function=exact", f"reward.file={PROJECT}/rewards/exact.py"]
    words += [f"train.max_tokens_per_micro_batch={tokens + 64}", "rollout.timeout_s=900"]
    words += ["train.timeout_s=900"]
    cfg = compose([*words, "+reward.options.marker='Answer: '"])
    return dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, dp=dims.dp))


def sampling(cfg: Config, model: NemotronH) -> Any:
    return build.Sampling(cfg.seed, cfg.rollout.max_response_tokens, 1.0, 1.0, 0, (3,))


def worker_spec(cfg: Config, recipe: Path, dims: ParallelDims) -> WorkerSpec:
    return WorkerSpec(
        model_path=recipe,
        dtype="bf16",
        device="cpu",
        dims=dims,
        train=cfg.train,
        optim=cfg.optim,
        algo=cfg.algo,
        temperature=1.0,
        sync_timeout_s=900.0,
        seed=0,
    )


def fake_engines(
    num_ranks: int, actors: Sequence[Any], tiny: NemotronH, planned: NemotronH
) -> list[FakeEngine]:
    dims, engines = EngineDims(tp=BLOCK, dp=4, ep=BLOCK), []
    held = [[h for p in params(planned, dims, r, Cuts()) for h in p.hosted] for r in range(BLOCK)]
    options = EngineOptions(max_seq_len=1 << 20, stall_s=900.0)
    for first in range(0, num_ranks, BLOCK):
        ranks = [
            Remote(f"engine rank {r}", FakeHandle(actors[r // PER_ACTOR], num_ranks + r, False))
            for r in range(first, first + BLOCK)
        ]
        spawn: Callable[[], Any] = partial(list, ranks)
        engine = FakeEngine(f"engine {first // BLOCK}", spawn, (tiny, dims), options, 900.0)
        engine.held = held
        engines.append(engine)
    return engines


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'driver CPU s (wall s)':24}" + "".join(f"{row['ranks']:>16} ranks" for row in rows))
    for name in rows[0]["cpu_s"]:
        cells = [f"{row['cpu_s'][name]:.2f} ({row['wall_s'][name]:.2f})" for row in rows]
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))
    once = ("start", "plan the sync", "checkpoint")
    for title, seconds in (
        ("a step, no checkpoint", "cpu_s"),
        ("the same, wall", "wall_s"),
    ):
        sums = [sum(s for name, s in row[seconds].items() if name not in once) for row in rows]
        print(f"{title:24}" + "".join(f"{each:22.2f}" for each in sums))
    print(f"{'MB in a step':24}" + "".join(f"{sum(r['bytes'].values()) / 1e6:22.1f}" for r in rows))
    cells = [f"{row['bytes_per_token']:22.1f}" for row in rows]
    print(f"{'bytes a token':24}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 128, 1024])
    parser.add_argument("--tokens", type=int, default=1024, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="and one that counts bytes")
    parser.add_argument("--model", type=Path, default=PROJECT / "configs/model/nemotron3_ultra")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"simulated": []}
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    for num_ranks in options.ranks:
        folder = Path(tempfile.mkdtemp())
        try:
            found["simulated"].append(
                simulate(num_ranks, options.tokens, options.model, options.rounds, folder)
            )
        finally:
            shutil.rmtree(folder)
        table(found["simulated"])
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
