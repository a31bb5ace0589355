"""GRPO with SGLang as the engine, from the command line, beside the same run on the embedded."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from miles_lite.run import read_metrics, read_samples
from tests.rollout.sglang.servers import python
from tests.test_supervise import trained, wait_for
from tests.test_train import finished, launch

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

STEPS = 3
RUN = [
    f"train.num_steps={STEPS}",
    "eval.temperature=0",
    "algo.routing_replay=true",
    "cluster.start_timeout_s=600",
    "rollout.timeout_s=600",
    "sync.timeout_s=300",
]


def lose_the_server(process: subprocess.Popen[str], run: Path) -> None:
    """Kill the part of SGLang that computes, in the middle of the answers of the second step."""
    logged = run / "metrics.jsonl"
    wait_for(lambda: logged.is_file() and trained(run) == 1, process, 900)
    time.sleep(0.2)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "".join(child.cmdline()).startswith("sglang::scheduler"):
            child.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    engines = {
        "embedded": ["rollout.engine.backend=embedded"],
        "sglang": ["rollout.engine.backend=sglang", f"rollout.engine.python={python()}"],
    }
    folders = {}
    for name, words in engines.items():
        folder = tmp_path_factory.mktemp(name)
        process = launch(folder, *RUN, *words)
        if name == "sglang":
            lose_the_server(process, folder / "run")
        told = finished(process, 1500)
        assert process.returncode == 0, told[-4000:]
        folders[name] = folder / "run"
    return folders


def test_both_engines_serve_the_same_policy(runs: dict[str, Path]) -> None:
    """Greedy answers to held-out prompts, before anything is trained."""
    answers = {}
    for name, folder in runs.items():
        (first, *_) = sorted((folder / "eval").glob("*/step_*0.jsonl.gz"))
        answers[name] = [(s.prompt, s.response, s.reward) for s in read_samples(first)]
    assert len(answers["sglang"]) > 20
    assert answers["sglang"] == answers["embedded"]


def test_metrics_of_both_agree(runs: dict[str, Path]) -> None:
    sglang, embedded = (read_metrics(runs[name]) for name in ("sglang", "embedded"))
    assert set(sglang) == set(embedded) >= set(range(STEPS))
    # groups of equal rewards are counted by the reward that they have
    missing = set(embedded[0]) - set(sglang[0])
    assert not {name for name in missing if not name.startswith("rollout/zero_std/count_")}
    for step in range(STEPS):
        ours, theirs = sglang[step], embedded[step]
        assert ours["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert ours["train/routing_flip_rate"] == 0
        assert ours["rollout/weight_version/mean"] == step
        assert ours["sync/bytes_over_hosted"] == 1.0
        assert ours["memory/train/rollout_weights_bytes"] == 0
        # 32 answers of a policy that is right about half the time: three standard errors
        assert ours["rollout/raw_reward"] == pytest.approx(theirs["rollout/raw_reward"], abs=0.3)


def test_a_server_that_dies_comes_back_within_the_step(runs: dict[str, Path]) -> None:
    """And all that is held against the other engine holds of its successor, too."""
    assert read_metrics(runs["sglang"])[1]["perf/engine_restarts"] >= 1


def test_the_log_of_the_server_stays_with_the_run_and_has_no_secret(runs: dict[str, Path]) -> None:
    log = (runs["sglang"] / "engines" / "engine-0-node-0.log").read_text()
    assert "'***'" in log  # where SGLang tells its options
    assert "/generate" not in log  # a line for every request would bury the rest
