"""What a finished run says of itself, from the metrics it logged."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_lite.log import few
from miles_lite.protocols import Metrics
from miles_lite.untrusted import numbered_lines, parse_object

logger = logging.getLogger(__name__)

Summary = dict[str, float | int | str]

RESTARTS = "restarts.jsonl"  # in the run folder: a line for each restart, see supervise.py
LAST_STEPS = 5  # one step is few prompts: the closing reward is a mean over some


def summarize(folder: Path, steps: Mapping[int, Metrics]) -> Summary:
    """First and last rewards, held-out accuracy, drift, speed. Missing metrics are left out.

    steps: metrics by step, as run.read_metrics gives them. The first step pays for warming up, so
    speeds are medians.
    """
    trained = [metrics for metrics in steps.values() if "perf/step_time" in metrics]
    found: Summary = {"run_folder": str(folder), "num_steps": len(trained)}
    if restarts := read_restarts(folder):
        causes = [f"after {line['step']} steps {line['cause']}" for line in reversed(restarts)]
        found |= {"restarts": len(restarts), "restart_causes": few(causes)}

    def seen(name: str) -> list[float]:
        return [metrics[name] for metrics in trained if name in metrics]

    if rewards := seen("rollout/raw_reward"):  # a step whose answers all lack a verdict has none
        found |= {
            "reward_first": rewards[0],
            "reward_last": statistics.fmean(rewards[-LAST_STEPS:]),
            "reward_last_step": rewards[-1],
            "reward_best": max(rewards),
        }
    for key, tell, name in (
        ("drift_max", _most, "train/train_rollout_logprob_abs_diff"),
        ("step_time_s", statistics.median, "perf/step_time"),
        ("rollout_tokens_per_s", statistics.median, "perf/rollout_tokens_per_s"),
        ("train_tokens_per_s", statistics.median, "perf/actor_train_tok_per_s"),
        ("nonfinite_logprobs", sum, "train/nonfinite_logprobs"),
        ("invalid_rewards", _most, "reward/invalid_ratio"),
    ):
        if values := seen(name):
            found[key] = tell(values)
    return found | held_out(steps.values())


def _most(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def held_out(steps: Iterable[Metrics]) -> Summary:
    """ "eval/SET before" and "eval/SET after": the first and the last mean reward of each set."""
    found: Summary = {}
    for metrics in steps:
        for name, value in metrics.items():
            if f"{name}-truncated_ratio" in metrics:  # so it is a set, whatever its name
                found.setdefault(f"{name} before", value)
                found[f"{name} after"] = value
    return found


def read_restarts(folder: Path) -> list[dict[str, Any]]:
    """What a supervisor wrote of each restart: time, step, code, cause. Lines that a full disk or a
    crash cut are told and left out: a run is not to fail for them."""
    path, found = folder / RESTARTS, list[dict[str, Any]]()
    if path.is_file():
        with path.open("rb") as file:
            for where, line in numbered_lines(file, path):
                try:
                    found.append(parse_object(line, where))
                except ValueError as error:
                    logger.warning("left out: %s", error)
    return found


def lines(summary: Summary) -> list[str]:
    """For people."""
    told = [f"steps trained      {summary['num_steps']}"]
    if "reward_first" in summary:
        told.append(
            f"reward             {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}"
            f" (mean of the last {LAST_STEPS} steps; best {summary['reward_best']:.3f})"
        )
    elif summary["num_steps"]:
        told.append("reward             none: no answer has a verdict")
    if "drift_max" in summary:
        told += [
            f"drift              at most {summary['drift_max']:.2e} nats a token"
            " (|log p trainer - log p engine|)",
            f"speed              {summary['step_time_s']:.2f} s a step, rollout "
            f"{summary['rollout_tokens_per_s']:,.0f} and training "
            f"{summary['train_tokens_per_s']:,.0f} tokens/s",
        ]
    for key, before in summary.items():
        if key.endswith(" before"):
            name = key.removesuffix(" before")
            told.append(f"{name:<18} {before:.3f} -> {summary[f'{name} after']:.3f} (held out)")
    if "restarts" in summary:
        told.append(f"restarts           {summary['restarts']}: {summary['restart_causes']}")
    return [*told, f"run folder         {summary['run_folder']}"]
