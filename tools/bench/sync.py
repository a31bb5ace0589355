"""The weight sync: what it moves, how fast against memcpy, and the plan of the reference run.

    python tools/bench/sync.py [--hidden 640] [--rounds 5] [--layouts tp=1,dp=2,ep=2 ...]
                               [--no-ultra] [--json FILE]

A random model of some hundred MB, real trainer ranks and engine processes. `shared` is a sync on
one host, through shared memory; `relayed` pretends that each rank is a host of its own, so that all
that is not beside its engine rank goes through gloo. Rounds of both and of memcpy alternate.

A byte of a sync is copied twice, into a bucket and out of it, and read twice, for the checksums of
both sides: `copies` is the time that two copies by memcpy would take, over the time of the sync.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

PROJECT = Path(__file__).parents[2]
sys.path.append(str(PROJECT))  # for tools.make_model

from miles_lite import build  # noqa: E402
from miles_lite.compose import compose  # noqa: E402
from miles_lite.models.nemotron_h import NemotronH  # noqa: E402
from miles_lite.parallel import EngineDims, ParallelDims  # noqa: E402
from miles_lite.planner.hardware import Hardware  # noqa: E402
from miles_lite.planner.traffic import sync_traffic  # noqa: E402
from miles_lite.protocols import Phase  # noqa: E402
from miles_lite.rollout.sglang.layout import Cuts, params  # noqa: E402
from miles_lite.weights.plan import Route, sync_plan  # noqa: E402
from miles_lite.weights.sender import itineraries  # noqa: E402
from miles_lite.weights.table import hf_tensors, trainer_layout  # noqa: E402
from tools.make_model import write  # noqa: E402

T = TypeVar("T")
LAYOUTS = ("tp=1,dp=2,ep=2", "tp=2,dp=1,ep=2")
SPREAD = "{:.2f} ({:.2f} to {:.2f})"


def medium(values: Sequence[float]) -> str:
    return SPREAD.format(statistics.median(values), min(values), max(values))


def memcpy_gb_s(num_bytes: int) -> float:
    """From memory to memory, in pieces of 16 MB, on one thread, pages touched before."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    begin = time.perf_counter()
    for start in range(0, num_bytes, 1 << 24):
        target[start : start + (1 << 24)].copy_(source[start : start + (1 << 24)])
    return num_bytes / (time.perf_counter() - begin) / 1e9


@contextlib.contextmanager
def started(model: Path, layout: str) -> Iterator[build.Parts]:
    """The parts of a run, with two engine processes that share the devices of the trainer."""
    words = [f"parallel.{word}" for word in layout.split(",")]
    cfg = compose(["experiment=tiny", f"model.path={model}", *words, "sync.bucket_bytes=16777216"])
    with build.start(cfg, build.read(cfg), model.parent) as parts:
        yield parts


def bench_real(model: Path, layout: str, rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    with started(model, layout) as parts:
        trainer, rollout = parts.trainer, parts.rollout
        trainer.enter(Phase.sync)
        ranks = len(trainer._workers)
        reach = {"shared": trainer._reach, "relayed": [f"host {i}" for i in range(ranks)]}
        hosted = rollout.held_bytes()["weights"]
        for turn in range(rounds + 1):  # the first fills page tables
            times["memcpy"].append(memcpy_gb_s(hosted // ranks))
            for kind, hosts in reach.items():
                trainer._reach, trainer._planned_for = hosts, ()
                trainer.send_weights(rollout, 2 * turn)  # plans
                metrics = trainer.send_weights(rollout, 2 * turn + 1)
                times[kind].append(metrics["perf/update_weights_time"])
                found[kind] = metrics
    copy_gb_s = statistics.median(times["memcpy"][1:])
    rows = []
    for kind in reach:
        seconds, metrics = times[kind][1:], found[kind]
        sent = metrics["sync/bytes"]
        assert metrics["sync/bytes_over_hosted"] == sent / hosted
        rows.append(
            {
                "layout": layout,
                "kind": kind,
                "hosted": hosted,
                "sent": sent,
                "received": sent,  # every slice, or the checksums would have differed
                "relayed": metrics["sync/relayed_bytes"],
                "over_lower_bound": sent / hosted,
                "seconds": seconds,
                "GB_s": sent / statistics.median(seconds) / 1e9,
                "memcpy_GB_s": copy_gb_s,
                "copies": 2 * sent / copy_gb_s / 1e9 / statistics.median(seconds),
            }
        )
        print(
            f"{layout:16}{kind:8} sent {sent / 1e6:7.1f} MB = {sent / hosted:.3f} of hosted,"
            f" relayed {metrics['sync/relayed_bytes'] / 1e6:6.1f} MB, {medium(seconds)} s,"
            f" {rows[-1]['GB_s']:.2f} GB/s; memcpy {copy_gb_s:.1f} GB/s,"
            f" copies {rows[-1]['copies']:.2f}"
        )
    return rows


# ------------------------------------------------------------------ the reference run


def timed(what: str, times: dict[str, float], work: Callable[[], T]) -> T:
    begin = time.process_time()
    done = work()
    times[what] = time.process_time() - begin
    return done


def ultra_plan(num_hosts: int) -> dict[str, Any]:
    """8 devices a host, one engine of 32 for each 4 hosts: everything the driver derives and sends
    once, before the first sync, for as many engines as there is room for."""
    model = NemotronH.from_folder(PROJECT / "configs/model/nemotron3_ultra")
    world = 8 * num_hosts
    trainer = ParallelDims(tp=8, pp=4, dp=world // 32, ep=32, expert_tp=1)
    engine = EngineDims(tp=32, dp=4, ep=32)
    times: dict[str, float] = {}
    ranks = range(world)
    tensors = timed("tensors", times, lambda: hf_tensors(model))
    sources = timed("sources", times, lambda: [trainer_layout(model, trainer, r) for r in ranks])
    of_engine = timed(
        "targets",
        times,
        lambda: [
            [hosted for param in params(model, engine, r, Cuts()) for hosted in param.hosted]
            for r in range(engine.tp)
        ],
    )
    targets = of_engine * (world // engine.tp)
    routes: list[Route] = timed(
        "plan", times, lambda: sync_plan(tensors, sources, targets, ranks, 2, 256 << 20)
    )
    hosts = [str(rank // 8) for rank in ranks]
    ways = timed("ways", times, lambda: itineraries(routes, hosts, ranks))
    mine = {rank: [w for w in ways if rank in (w.route.source, w.last)] for rank in (0, world - 1)}
    sizes = timed("told a rank", times, lambda: len(pickle.dumps(mine[0], 5)))
    flows: Counter[tuple[int, int]] = Counter()
    for route in routes:
        flows[route.source, route.target] += route.num_bytes
    sent, received = Counter[int](), Counter[int]()
    for (source, target), num_bytes in flows.items():
        sent[source] += num_bytes
        received[target] += num_bytes
    traffic = sync_traffic(flows, Hardware.named("h100"))
    total = traffic.total
    row = {
        "ranks": world,
        "engines": world // engine.tp,
        "cpu_s": times,
        "routes": len(routes),
        "copies": sum(len(route.copies) for route in routes),
        "bytes_told_a_rank": sizes,
        "bytes": total,
        "received_by_a_rank": max(received.values()),
        "share": {k: getattr(traffic, k) / total for k in ("local", "nvlink", "network")},
        "busiest": {"nvlink": traffic.busiest.nvlink, "network": traffic.busiest.network},
        "sent_max_over_mean": max(sent.values()) * world / total,
        "received_max_over_mean": max(received.values()) * world / total,
    }
    print(f"Ultra, {world} trainer ranks, {row['engines']} engines of 32:")
    for name, value in row.items():
        print(f"  {name:24}{value}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=640, help="width of the random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--no-ultra", action="store_true", help="leave out the plan of 128 ranks")
    parser.add_argument("--hosts", type=int, default=16, help="of that plan, of 8 devices each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"real": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        wide_copy(model, options.hidden)
        for layout in options.layouts:
            found["real"] += bench_real(model, layout, options.rounds)
    if not options.no_ultra:
        found["ultra"] = ultra_plan(options.hosts)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def wide_copy(folder: Path, hidden: int) -> None:
    """The tiny model, with its tokenizer, made wide."""
    source = PROJECT / "configs/model/tiny"
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "moe_latent_size": hidden // 2,
        "moe_intermediate_size": hidden,
        "intermediate_size": hidden,
        "moe_shared_expert_intermediate_size": 2 * hidden,
        "n_routed_experts": 32,
        "head_dim": hidden // 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": hidden // 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, config, 1 << 30, 0)


if __name__ == "__main__":
    main()
