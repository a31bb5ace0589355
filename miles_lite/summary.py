"""What a finished run says of itself, from the metrics it logged."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_lite.log import few
from miles_lite.protocols import Metrics

Summary = dict[str, float | int | str]

RESTARTS = "restarts.jsonl"  # in the run folder: a line for each restart, see supervise.py
LAST_STEPS = 5  # one step is few prompts: the closing reward is a mean over some


def summarize(folder: Path, steps: Mapping[int, Metrics]) -> Summary:
    """First and last rewards, held-out accuracy, drift, speed. Missing metrics are left out.

    steps: metrics by step, as run.read_metrics gives them. The first step pays for warming up, so
    speeds are medians.
    """
    trained = [metrics for metrics in steps.values() if "rollout/raw_reward" in metrics]
    rewards = [metrics["rollout/raw_reward"] for metrics in trained]
    found: Summary = {"run_folder": str(folder), "num_steps": len(trained)}
    if restarts := read_restarts(folder):
        causes = [f"after {line['step']} steps {line['cause']}" for line in reversed(restarts)]
        found |= {"restarts": len(restarts), "restart_causes": few(causes)}
    if not trained:
        return found
    found |= {
        "reward_first": rewards[0],
        "reward_last": statistics.fmean(rewards[-LAST_STEPS:]),
        "reward_last_step": rewards[-1],
        "reward_best": max(rewards),
        "drift_max": max(m["train/train_rollout_logprob_abs_diff"] for m in trained),
        "step_time_s": statistics.median(m["perf/step_time"] for m in trained),
        "rollout_tokens_per_s": statistics.median(m["perf/rollout_tokens_per_s"] for m in trained),
        "train_tokens_per_s": statistics.median(m["perf/actor_train_tok_per_s"] for m in trained),
        "nonfinite_logprobs": sum(m["train/nonfinite_logprobs"] for m in trained),
        "invalid_rewards": max(m["reward/invalid_ratio"] for m in trained),
    }
    evals = [
        (step, name, value)
        for step, metrics in steps.items()
        for name, value in metrics.items()
        if name.startswith("eval/") and name.count("/") == 1 and "-" not in name
    ]
    if evals:
        found |= {"eval_before": evals[0][2], "eval_after": evals[-1][2], "eval_name": evals[0][1]}
    return found


def read_restarts(folder: Path) -> list[dict[str, Any]]:
    """What a supervisor wrote of each restart: time, step, code, cause."""
    file = folder / RESTARTS
    return [*map(json.loads, file.read_text().splitlines())] if file.is_file() else []


def lines(summary: Summary) -> list[str]:
    """For people."""
    told = [f"steps trained      {summary['num_steps']}"]
    if "reward_first" in summary:
        told += [
            f"reward             {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}"
            f" (mean of the last {LAST_STEPS} steps; best {summary['reward_best']:.3f})",
            f"drift              at most {summary['drift_max']:.2e} nats a token"
            " (|log p trainer - log p engine|)",
            f"speed              {summary['step_time_s']:.2f} s a step, rollout "
            f"{summary['rollout_tokens_per_s']:,.0f} and training "
            f"{summary['train_tokens_per_s']:,.0f} tokens/s",
        ]
    if "eval_before" in summary:
        told.append(
            f"{summary['eval_name']:<18} {summary['eval_before']:.3f} -> "
            f"{summary['eval_after']:.3f} (held out)"
        )
    if "restarts" in summary:
        told.append(f"restarts           {summary['restarts']}: {summary['restart_causes']}")
    return [*told, f"run folder         {summary['run_folder']}"]
