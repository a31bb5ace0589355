"""Tokens a second of a training step against plain torch on the same modules; padding; collectives.

    python tools/bench/train.py [--models tiny 10m] [--ranks 1 2 4] [--rounds 5] [--json FILE]

"plain" is forward, log-softmax of the targets and backward of the very modules of the step, one
packed micro-batch after the other, without schedule, DDP, optimizer, loss or metrics: in turns with
the step, in one process, by seconds of its CPU. Padding is what packed sequences are widened by
where a layer looks at them one by one (Mamba, attention). With several data-parallel ranks, of one
thread and equal work each, the share of gloo's collectives in the wall of a step is told, waiting
for the others included: on fewer cores than ranks it is mostly that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import SIZES, folder_of

from miles_lite.algo.packing import PackSettings, pack
from miles_lite.config import AlgoConfig, OptimConfig, TrainConfig
from miles_lite.parallel import ParallelDims
from miles_lite.protocols import Phase
from miles_lite.types import MicroBatch, TrainSequence

MAX_TOKENS = 8192  # of a micro-batch
SAMPLES = {"tiny": 128, "10m": 32, "50m": 16}  # of each rank
Share = Sequence[Sequence[MicroBatch]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=("tiny", "10m"))
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="all rounds")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.models:
            folder = folder_of(size, Path(scratch))
            for num_ranks in options.ranks:
                found.append(bench(size, folder, num_ranks, options.rounds))
                print(line(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def bench(size: str, folder: Path, num_ranks: int, rounds: int) -> dict[str, Any]:
    """A row of what `line` tells: seconds of CPU of rank 0, by round."""
    context = multiprocessing.get_context("spawn")
    results, addresses = context.Queue(), context.Queue()
    job = (size, folder, num_ranks, rounds)
    ranks = [
        context.Process(target=run, args=(rank, *job, results, addresses), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    row = results.get(timeout=300)
    for process in ranks:
        process.join()
    return {"model": size, "ranks": num_ranks} | row | {"load": os.getloadavg()[0]}


def line(row: dict[str, Any]) -> str:
    told = (
        f"{row['model']:<5} {row['ranks']} ranks: step {spread(row['tokens'], row['step'])} "
        f"tokens/s of CPU a rank, padding {row['padding']:.0%}"
    )
    if row["plain"]:
        ratio = statistics.median(a / b for a, b in zip(row["plain"], row["step"], strict=True))
        told += f", plain torch {spread(row['tokens'], row['plain'])}, step / plain {ratio:.2f}"
    if row["collectives"]:
        told += f", collectives {statistics.median(row['collectives']):.0%} of the wall"
    return f"{told}, load {row['load']:.0f}"


def run(
    rank: int, size: str, folder: Path, num_ranks: int, rounds: int, results: Any, addresses: Any
) -> None:
    """One rank; rank 0 puts a row into `results`."""
    from miles_lite.trainer.megatron.messages import WorkerSpec
    from miles_lite.trainer.megatron.worker import MegatronWorker

    spec = WorkerSpec(
        model_path=folder,
        dtype="fp32",
        device="cpu",
        dims=ParallelDims(tp=1, pp=1, dp=num_ranks, ep=1, expert_tp=1),
        train=TrainConfig(num_steps=1, max_tokens_per_micro_batch=MAX_TOKENS),
        optim=OptimConfig(lr=1e-5),
        algo=AlgoConfig(),
        temperature=1.0,
        sync_timeout_s=60,
        seed=0,
    )
    worker = MegatronWorker(spec, rank)
    if rank == 0:
        address = worker.listen("127.0.0.1")
        for _ in range(num_ranks - 1):
            addresses.put(address)
    else:
        address = addresses.get()
    worker.setup(address)
    worker.enter(Phase.train)
    share = shares(SAMPLES[size], num_ranks)[rank]
    num_tokens = sum(micro_batch.num_tokens for micro_batch in share[0])
    step: list[float] = []
    plain: list[float] = []
    gloo: list[float] = []
    for count in range(rounds + 1):  # the first one warms up
        begin = time.process_time()
        worker.step(share)
        middle = time.process_time()
        if num_ranks == 1:
            plain_passes(worker._ddp.module, share)
            end = time.process_time()
        if not count:
            continue
        step.append(middle - begin)
        if num_ranks == 1:
            plain.append(end - middle)
        else:
            gloo.append(collective_share(worker, share))
    if rank == 0:
        told = {"tokens": num_tokens, "padding": padding(share)}
        results.put(told | {"step": step, "plain": plain, "collectives": gloo})


def shares(num_samples: int, num_ranks: int) -> list[Share]:
    """By rank; prompts of 18 tokens and answers of 10 to 20, as in the tiny task."""
    draw = random.Random(0)
    made = []
    for sample in range(num_samples * num_ranks):
        length = draw.randint(28, 38)
        tokens = tuple(draw.randrange(4, 128) for _ in range(length))
        logprobs, advantage = (-4.0,) * (length - 18), draw.gauss(0, 1)
        made.append(
            TrainSequence(tokens, 18, logprobs, sample, sample // 8, 0.0, advantage, counts=True)
        )
    settings = PackSettings(
        dp=num_ranks,
        global_batch=len(made),
        max_tokens=MAX_TOKENS,
        aggregation="sample",
        aggregation_constant=1.0,
        train_zero_advantage=True,
        cost=lambda num_tokens: num_tokens,
    )
    (update,) = pack(made, settings).updates
    return [[micro_batches] for micro_batches in update.micro_batches]


def plain_passes(module: Any, share: Share) -> None:
    import torch
    import torch.nn.functional as F

    from miles_lite.trainer.megatron.forward import _packed_seq_params, packed

    for micro_batch in share[0]:
        inputs = packed(micro_batch, 1, torch.device("cpu"))
        params = _packed_seq_params(inputs)
        hidden = module(inputs.tokens, inputs.position_ids, None, packed_seq_params=params)
        rows = hidden.squeeze(0).index_select(0, inputs.loss_positions)
        logits = F.linear(rows, module.output_layer.weight)
        F.cross_entropy(logits, inputs.targets).backward()


def collective_share(worker: Any, share: Share) -> float:
    """Of the wall of one more step."""
    from torch.profiler import ProfilerActivity, profile

    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as told:
        worker.step(share)
        wall_s = time.perf_counter() - begin
    # gloo's own events overlap where several are under way: the union is what it takes
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in told.events() or ()
        if event.name.startswith("gloo:")
    )
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy * 1e-6 / wall_s


def padding(share: Share) -> float:
    """Widened by it, of what is computed."""
    from miles_lite.trainer.megatron.stand_ins import Unpacking

    real = total = 0
    for micro_batch in share[0]:
        lens = [len(sequence.tokens) for sequence in micro_batch.sequences]
        real += sum(lens)
        total += sum(batch.tokens.numel() for batch in Unpacking.of(lens).batches)
    return 1 - real / total


def spread(num_tokens: int, seconds: Sequence[float]) -> str:
    middle, low, high = (num_tokens / f(seconds) for f in (statistics.median, max, min))
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


if __name__ == "__main__":
    main()
