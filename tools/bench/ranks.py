"""Whole steps with the same work on each rank, on 1 to 8 real ranks, and planned up to 1,024.

    python tools/bench/ranks.py [--ranks 1 2 4 8] [--planned 64 1024] [--steps 6] [--json FILE]

Runs of the tiny recipe: data parallel, 64 samples and one engine process a rank, all on the cores
there are. Medians of the steps after the first. `driver` is what no phase accounts for: credit,
packing, metrics, calls. `planned` is the planner's estimate for as many ranks with a core each,
times what it is wrong by at the first size; where ranks share cores, `shared` is that times ranks
over cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles_lite.compose import compose
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner.plan import Expected
from miles_lite.run import read_metrics

PHASES = ("perf/rollout_time", "perf/train_time", "perf/update_weights_time")
STEP = "perf/step_time"


def words(num_ranks: int) -> list[str]:
    experts = min(8, num_ranks)
    sizes = {
        "parallel.dp": num_ranks,
        "parallel.ep": experts,
        "rollout.engine.num_engines": num_ranks,
        "rollout.num_prompts": 8 * num_ranks,
        "train.global_batch": 64 * num_ranks,
    }
    fixed = [f"rollout.engine.{size}=1" for size in ("tp", "dp", "ep")]
    return ["experiment=tiny", *fixed, *(f"{key}={value}" for key, value in sizes.items())]


def measured(num_ranks: int, steps: int) -> dict[str, float]:
    """Seconds by phase of a run with so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run = [f"log.folder={folder}", "log.name=run", f"train.num_steps={steps}", "data.eval={}"]
        command = [sys.executable, "-m", "miles_lite.cli", "train", *words(num_ranks), *run]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # the last evaluation is logged as a step of its own
        metrics = [m for m in read_metrics(Path(folder, "run")).values() if STEP in m][1:]
    found = {name: statistics.median(m[name] for m in metrics) for name in (STEP, *PHASES)}
    rest = [m[STEP] - sum(m[name] for name in PHASES) for m in metrics]
    return found | {"driver": statistics.median(rest)}


def planned(num_ranks: int) -> float:
    cfg = compose(words(num_ranks))
    seconds = Expected.of(cfg, NemotronH.from_folder(cfg.model.path)).seconds
    return sum(seconds[name] for name in PHASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--planned", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    wrong_by = 1.0
    for num_ranks in sorted({*options.ranks, *options.planned}):
        real = num_ranks in options.ranks
        row: dict[str, Any] = {"ranks": num_ranks}
        if real:
            row |= measured(num_ranks, options.steps)
        if not rows:
            wrong_by = row[STEP] / planned(num_ranks)
        row["planned"] = wrong_by * planned(num_ranks)
        row["shared"] = row["planned"] * max(1.0, num_ranks / (os.cpu_count() or 1))
        rows.append(row)
        show(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def show(row: dict[str, Any], names: Sequence[str] = (STEP, *PHASES, "driver")) -> None:
    cells = [f"{name.removeprefix('perf/')} {row[name]:.3f}" for name in names if name in row]
    cells += [f"planned {row['planned']:.3f}", f"shared {row['shared']:.3f}"]
    print(f"{row['ranks']:5} ranks  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
