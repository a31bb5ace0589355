"""The closing words of a run, from its metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from miles_lite.summary import RESTARTS, lines, summarize


def step(reward: float, drift: float) -> dict[str, float]:
    return {
        "rollout/raw_reward": reward,
        "train/train_rollout_logprob_abs_diff": drift,
        "train/nonfinite_logprobs": 0.0,
        "reward/invalid_ratio": 0.1,
        "perf/step_time": 2.0,
        "perf/rollout_tokens_per_s": 1000.0,
        "perf/actor_train_tok_per_s": 3000.0,
    }


def held_out(name: str, reward: float) -> dict[str, float]:
    parts = {f"{name}-mean@1": reward, f"{name}-mean@1-low": 0.0, f"{name}-truncated_ratio": 0.9}
    return {name: reward, **parts, f"{name}/response_len/mean": 12.0}


def test_first_and_last_rewards_drift_and_evaluation() -> None:
    rewards = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    steps = {i: step(reward, 1e-7 * (i + 1)) for i, reward in enumerate(rewards)}
    steps[0] |= held_out("eval/aime-2024", 0.1) | held_out("eval/gsm8k", 0.45)
    steps[7] = held_out("eval/aime-2024", 0.2) | held_out("eval/gsm8k", 0.85)
    summary = summarize(Path("runs/x"), steps)
    assert summary["num_steps"] == 7
    assert summary["reward_first"] == 0.4
    assert summary["reward_last"] == pytest.approx(0.8)  # of 0.6 ... 1.0
    assert summary["reward_last_step"] == summary["reward_best"] == 1.0
    assert summary["drift_max"] == pytest.approx(7e-7)
    evals = {key: value for key, value in summary.items() if key.startswith("eval/")}
    assert evals == {
        "eval/aime-2024 before": 0.1,
        "eval/aime-2024 after": 0.2,
        "eval/gsm8k before": 0.45,
        "eval/gsm8k after": 0.85,
    }
    text = "\n".join(lines(summary))
    assert "0.400 -> 0.800" in text and "0.100 -> 0.200" in text and "0.450 -> 0.850" in text
    assert "runs/x" in text


def test_a_run_without_steps_says_so() -> None:
    summary = summarize(Path("runs/x"), {})
    assert summary == {"run_folder": "runs/x", "num_steps": 0}
    assert lines(summary)[0].endswith("0")


def test_a_restart_that_a_full_disk_cut_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = '{"time": 1.0, "step": 3, "code": 1, "cause": "so it was"}'
    (tmp_path / RESTARTS).write_text("\n".join([whole, whole[:30] + whole, whole, whole[:30]]))
    summary = summarize(tmp_path, {})
    assert summary["restarts"] == 2 and "so it was" in str(summary["restart_causes"])
    assert [message.split(": not JSON")[0] for message in caplog.messages] == [
        f"left out: {tmp_path / RESTARTS}:{number}" for number in (2, 4)
    ]


def test_a_step_without_a_verdict_counts() -> None:
    dead = step(0.0, math.nan) | {"reward/invalid_ratio": 1.0}
    del dead["rollout/raw_reward"]
    summary = summarize(Path("runs/x"), {0: step(0.5, 1e-7), 1: dead, 2: step(0.5, 1e-7)})
    assert (summary["num_steps"], summary["invalid_rewards"]) == (3, 1.0)
    assert math.isnan(float(summary["drift_max"]))  # wherever it stands
    told = lines(summarize(Path("runs/x"), {0: dead}))
    assert told[0].endswith("1") and told[1].endswith("no answer has a verdict")
