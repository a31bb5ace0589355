"""Every algorithm learns the tiny task by whole runs, and nothing learns from shuffled rewards."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from miles_lite.compose import CONFIGS
from miles_lite.run import read_metrics

ALGORITHMS = sorted(path.stem for path in (CONFIGS / "algo").glob("*.yaml"))
# one trainer rank, one engine of one process: two such runs share the machine
SMALL = """
parallel.dp=1 parallel.ep=1 rollout.engine.tp=1 rollout.engine.dp=1 rollout.engine.ep=1
data.eval='' log.samples=false train.num_steps=12
""".split()
DEADLINE_S = 240

SHUFFLED = f"""
import random, sys
sys.path.insert(0, {str(CONFIGS.parent)!r})
from rewards.deepscaler import deepscaler

def shuffled(responses, label):
    '''The true verdicts, dealt out among the answers of the group: their mean stays true.'''
    verdicts = [float(deepscaler(response, label)) for response in responses]
    random.Random(repr(responses)).shuffle(verdicts)
    return verdicts
"""


def rewards_of_a_run(folder: Path, name: str, *overrides: str) -> list[float]:
    """Mean raw reward of each step."""
    words = [sys.executable, "-m", "miles_lite.cli", "train", "experiment=tiny"]
    words += [f"log.folder={folder}", f"log.name={name}", *SMALL, *overrides]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=DEADLINE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
    metrics = read_metrics(folder / name)
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in metrics.values()) <= 1e-4
    return [metrics[step]["rollout/raw_reward"] for step in sorted(metrics)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[float]]]]:
    """Of each algorithm and of the control, two at a time."""
    folder = tmp_path_factory.mktemp("learning")
    reward = folder / "shuffled.py"
    reward.write_text(SHUFFLED)
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(rewards_of_a_run, folder, name, f"algo={name}") for name in ALGORITHMS
        }
        control = [f"reward.file={reward}", "reward.function=shuffled"]
        started["control"] = pool.submit(rewards_of_a_run, folder, "control", *control)
        yield started
        for run in started.values():
            run.cancel()


def gain(rewards: list[float]) -> float:
    return statistics.fmean(rewards[-3:]) - statistics.fmean(rewards[:2])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns(runs: dict[str, Future[list[float]]], algorithm: str) -> None:
    """0.15 to 0.3 within 12 steps; a step's mean swings by 0.03."""
    rewards = runs[algorithm].result()
    assert gain(rewards) > 0.1, rewards


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shuffled_rewards_teach_nothing(runs: dict[str, Future[list[float]]]) -> None:
    rewards = runs["control"].result()
    assert gain(rewards) < 0.05, rewards
