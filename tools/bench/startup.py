"""What passes before the first token: imports, Ray, processes and model, first sync and rollout.

    python tools/bench/startup.py [--rounds 3] [--json FILE] [experiment=tiny key=value ...]

Every round is in processes of their own, so nothing is imported or compiled before. Medians and
spread; of commands and imports also the CPU seconds, which a busy machine changes little. The
stages of a run follow one another; what the parts of `start` do, they do at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "python": ["-c", ""],
    "miles-lite --help": ["-m", "miles_lite.cli", "--help"],
    "import config, compose": ["-c", "import miles_lite.compose"],
    "import numpy": ["-c", "import numpy"],
    "import torch": ["-c", "import torch"],
    "import ray": ["-c", "import ray"],
    "import train": ["-c", "import miles_lite.train"],
    "import a trainer rank": ["-c", "import miles_lite.trainer.megatron.worker"],
    "import megatron's model": [
        "-c",
        "from miles_lite.trainer.megatron import cpu_compat; cpu_compat.install();"
        "import miles_lite.trainer.megatron.model, miles_lite.trainer.megatron.step",
    ],
    "import an engine rank": ["-c", "import miles_lite.rollout.embedded.rank"],
}


def command(words: Sequence[str]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def run_stages(overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """In this process, which has imported nothing yet: seconds of each stage of a run."""
    begin = time.perf_counter()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        nonlocal begin
        seconds[stage] = time.perf_counter() - begin
        begin = time.perf_counter()

    from miles_lite import build
    from miles_lite.compose import compose
    from miles_lite.protocols import Phase

    done("imports")
    cfg = compose(overrides)
    done("compose")
    inputs = build.check(cfg)
    done("check")
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.shutdown()
    done("Ray alone, up and down")
    with build.start(cfg, inputs, folder) as parts:
        done("start")
        parts.trainer.enter(Phase.sync)
        parts.rollout.enter(Phase.sync)
        parts.trainer.send_weights(parts.rollout, 0)
        done("first sync")
        parts.trainer.enter(Phase.generate)
        parts.rollout.enter(Phase.generate)
        parts.rollout.generate(parts.prompts)
        done("first rollout")
    done("stop")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stages-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=["experiment=tiny"])
    options = parser.parse_args()
    if options.stages_only:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(run_stages(options.overrides, Path(folder))))
        return
    clock: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, words in COMMANDS.items():
            seconds, used = command(words)
            clock[name].append(seconds)
            cpu[name].append(used)
        for stage, taken in in_a_new_process(options.overrides).items():
            clock[stage].append(taken)
    for name, times in clock.items():
        used = f"  CPU {statistics.median(cpu[name]):5.2f} s" if name in cpu else ""
        median = statistics.median(times)
        print(f"{name:26}{median:6.2f} s ({min(times):.2f} to {max(times):.2f}){used}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": clock, "cpu_s": cpu}, indent=2) + "\n")


def in_a_new_process(overrides: Sequence[str]) -> dict[str, Any]:
    words = [sys.executable, __file__, "--stages-only", *overrides]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
