"""A whole GRPO step of miles-lite against TRL's GRPOTrainer, on CPU cores, in turns.

    python tools/bench/vs_trl.py [--models tiny 10m 50m] [--rounds 3] [--json FILE]

Makes TRL's environment (.venv-trl, with the same torch and transformers) when it is not there.
Both sides get the same checkpoint, prompts, reward, number of samples and limit of tokens, fp32,
AdamW with the same settings, one optimizer update a step and two cores: two trainer ranks and two
engines of one thread that take turns, against the layouts of TRL in --trl (processes x threads), of
which the fastest counts. TRL has no gradient checkpointing, no KL and no logging to files; it draws
with transformers' `generate`, as vLLM has no CPU build for this model, and computes its experts as
--experts says. The tiny model ends its answers itself, equally often on both sides; the random ones
nearly never do, so that all answers have the same length. The first steps of a run warm up and are
left out. Times are of the wall; "cpu" is what all processes of a side, Ray's included, take of the
cores in a step: where neighbours load them, it tells more. "GB" is the most memory that they have
together up to the end of a step, looked at every other second.

TRL takes the log-probs before the update from the training pass itself where there is one update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from models import PROJECT, SIZES, folder_of

PINS = ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0", "pylatexenc==2.10")
PHASES = ("GB", "cpu", "step", "rollout", "reward", "log_probs", "train", "sync")
MEMORY_S = 2.0  # between looks at memory, which hold up whoever is looked at
Row = dict[str, float]  # seconds of one step by phase, its tokens, and GB


@dataclass(frozen=True, slots=True)
class Task:
    num_prompts: int
    num_samples: int
    response_len: int
    lr: float
    reward: tuple[str, str]  # file and function
    num_steps: int
    num_warm: int  # of them, which are not counted


DEEPSCALER, COIN = ("rewards/deepscaler.py", "deepscaler"), ("tools/bench/coin.py", "coin")
TASKS = {
    "tiny": Task(32, 8, 24, 4e-4, DEEPSCALER, 6, 2),
    "10m": Task(16, 8, 32, 1e-5, COIN, 4, 2),
    "50m": Task(8, 8, 32, 1e-5, COIN, 3, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", nargs="+", default=["2x1"], help="processes x threads of TRL")
    parser.add_argument("--experts", default="grouped_mm", help="batched_mm, grouped_mm or eager")
    parser.add_argument("--passes", type=int, default=1, help="of TRL's update; more: less memory")
    parser.add_argument("--json", type=Path, help="all steps")
    parser.add_argument("overrides", nargs="*", help="of miles-lite's configuration, after --")
    options = parser.parse_args()
    python = trl_python()
    found: dict[str, dict[str, list[Row]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.models:
            task, model = TASKS[size], folder_of(size, Path(scratch))
            sides: dict[str, list[Row]] = {}
            for _ in range(options.rounds):
                own = miles_lite(model, task, options.overrides, Path(scratch))
                sides.setdefault("miles-lite", []).extend(own)
                for layout in options.trl:
                    how = (layout, options.experts, options.passes)
                    theirs = trl(python, model, task, how, Path(scratch))
                    sides.setdefault(f"TRL {layout}", []).extend(theirs)
            print(table(size, task, sides), flush=True)
            found[size] = sides
    if options.json:
        load = os.getloadavg()
        options.json.write_text(json.dumps({"pins": PINS, "load": load, "steps": found}, indent=1))


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made if need be."""
    venv = PROJECT / ".venv-trl"
    stamp = venv / "setup-done"
    if not stamp.exists() or stamp.read_text() != " ".join(PINS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "--quiet", *PINS], check=True)
        stamp.write_text(" ".join(PINS))
    return venv / "bin/python"


def miles_lite(model: Path, task: Task, overrides: Sequence[str], scratch: Path) -> list[Row]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    file, function = task.reward
    words = [
        "experiment=tiny",
        f"model.path={model}",
        "parallel.ep=1",  # the model fits a device: its experts need not be cut
        "rollout.engine.num_engines=2",
        *(f"rollout.engine.{size}=1" for size in ("tp", "dp", "ep")),
        f"rollout.num_prompts={task.num_prompts}",
        f"rollout.samples_per_prompt={task.num_samples}",
        f"rollout.max_response_tokens={task.response_len}",
        f"train.global_batch={task.num_prompts * task.num_samples}",
        "train.max_tokens_per_micro_batch=8192",  # one pass, as TRL's
        f"sync.bucket_bytes={64 << 20}",
        f"train.num_steps={task.num_steps}",
        f"optim.lr={task.lr}",
        f"reward.file={PROJECT / file}",
        f"reward.function={function}",
        "reward.max_dead_steps=0",
        "data.eval={}",
        "checkpoint.every=0",
        f"log.folder={folder}",
        "log.name=run",
        *overrides,
    ]
    progress = folder / "run/metrics.jsonl"
    command = [sys.executable, "-m", "miles_lite.cli", "train", *words]
    seen = watched(command, {}, progress, b'"perf/step_time"')
    rows: list[Row] = []
    for line in progress.read_text().splitlines():
        metrics = json.loads(line)
        if "perf/step_time" not in metrics:
            continue
        rows.append(
            {
                "step": metrics["perf/step_time"],
                "rollout": metrics["perf/rollout_time"],  # rewards run beside it
                "reward": 0.0,
                "log_probs": metrics["perf/log_probs_time"],
                "train": metrics["perf/actor_train_time"],
                "sync": metrics["perf/update_weights_time"],
                "tokens": metrics["perf/rollout_tokens_per_s"] * metrics["perf/rollout_time"],
            }
        )
    return with_seen(rows, seen)[task.num_warm :]


def trl(
    python: Path, model: Path, task: Task, how: tuple[str, str, int], scratch: Path
) -> list[Row]:
    """how: processes x threads, implementation of the experts, passes of an update."""
    (processes, _, threads), experts, passes = how[0].partition("x"), how[1], how[2]
    out = scratch / f"trl{time.monotonic_ns()}.json"
    file, function = task.reward
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [Path(__file__).with_name("trl_side.py"), "--model", model, "--out", out]
    command += ["--data", PROJECT / "configs/data/tiny/train.jsonl"]
    command += ["--reward", f"{file.removesuffix('.py').replace('/', '.')}:{function}"]
    command += ["--prompts", task.num_prompts, "--samples", task.num_samples]
    command += ["--response", task.response_len, "--lr", task.lr, "--steps", task.num_steps]
    command += ["--threads", threads, "--experts", experts, "--passes", passes]
    env = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    seen = watched(list(map(str, command)), env, out.with_suffix(".steps"), b"step")
    return with_seen(json.loads(out.read_text()), seen)[task.num_warm :]


def with_seen(rows: Sequence[Row], seen: Sequence[tuple[float, float]]) -> list[Row]:
    """seen: as `watched` returns it."""
    before = [0.0, *(cpu_s for cpu_s, _ in seen)]
    return [
        row | {"cpu": cpu_s - begin, "GB": gigabytes}
        for row, begin, (cpu_s, gigabytes) in zip(rows, before, seen, strict=False)
    ]


def watched(
    command: Sequence[str], env: dict[str, str], progress: Path, mark: bytes
) -> list[tuple[float, float]]:
    """Run it; whenever `progress` has one more mark, the seconds of CPU of its whole tree of
    processes, and the most GB so far. Raises RuntimeError with the end of what it said, if it
    fails."""
    found: list[tuple[float, float]] = []
    most, looked = 0.0, 0.0
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, env=os.environ | env, stdout=said, stderr=said) as process:
            tree = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(0.02)
                if progress.exists() and progress.read_bytes().count(mark) > len(found):
                    found.append((sum(each_of(tree, cpu_s)), most))
                elif time.monotonic() > looked + MEMORY_S:
                    most = max(most, sum(each_of(tree, gigabytes)))
                    looked = time.monotonic()
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)}:\n{text[-4000:]}")
    return found


def each_of(tree: psutil.Process, tell: Callable[[psutil.Process], float]) -> Iterator[float]:
    """What is to be told of each process that is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [tree, *tree.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield tell(process)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def gigabytes(process: psutil.Process) -> float:
    """Of pages that several processes share, its part."""
    return process.memory_full_info().pss / 1e9


def table(size: str, task: Task, sides: dict[str, list[Row]]) -> str:
    lines = [
        f"{size}: {task.num_prompts} prompts x {task.num_samples} samples of at most "
        f"{task.response_len} tokens; medians (least to most) of {len(sides['miles-lite'])} steps, "
        f"seconds and GB; load {os.getloadavg()[0]:.1f}",
        f"{'':<14}" + "".join(f"{phase:<24}" for phase in PHASES) + "tokens a step",
    ]
    for name, rows in sides.items():
        cells = [f"{spread([row[phase] for row in rows]):<24}" for phase in PHASES]
        tokens = statistics.median(row["tokens"] for row in rows)
        lines.append(f"{name:<14}" + "".join(cells) + f"{tokens:.0f}")
    best = {
        phase: min(
            statistics.median(r[phase] for r in rows) for n, rows in sides.items() if n[0] == "T"
        )
        for phase in ("cpu", "step", "rollout", "train")
    }
    own = {phase: statistics.median(row[phase] for row in sides["miles-lite"]) for phase in PHASES}
    own["train"] += own["log_probs"]
    ratios = ", ".join(f"{phase} {best[phase] / own[phase]:.1f}x" for phase in best)
    return "\n".join([*lines, f"against the fastest of TRL: {ratios} (train with log-probs)", ""])


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
