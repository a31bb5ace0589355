"""Held-out accuracy of the policy as the engines serve it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from miles_lite.algo import pass_rate
from miles_lite.algo.pass_rate import Estimate
from miles_lite.protocols import Metrics
from miles_lite.rollout.manager import RolloutManager
from miles_lite.types import Finish, Group, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class EvalSet:
    """What is asked, and how answers are drawn."""

    name: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    samples_per_prompt: int
    pass_reward: float = 1.0  # with this reward, or more, an answer passes


def evaluate(rollout: RolloutManager, eval_set: EvalSet) -> tuple[Metrics, list[Group]]:
    """eval/{name} is the mean reward, over samples of each prompt and then over prompts.

    Seeds do not depend on the step: two evaluations differ by the weights alone.
    """
    groups = rollout.sample(
        eval_set.prompts, eval_set.sampling, eval_set.samples_per_prompt, f"eval/{eval_set.name}"
    )
    return eval_metrics(eval_set, groups), groups


def eval_metrics(eval_set: EvalSet, groups: Sequence[Group]) -> Metrics:
    """Of a set: mean reward and pass@k with their 95 % intervals, and how answers ended."""
    samples = [sample for group in groups for sample in group.samples]
    name = f"eval/{eval_set.name}"
    found = estimates(eval_set, groups)
    metrics = {name: next(iter(found.values())).value}
    for title, estimate in found.items():
        bounds = {"": estimate.value, "-low": estimate.low, "-high": estimate.high}
        metrics |= {f"{name}-{title}{end}": v for end, v in bounds.items() if math.isfinite(v)}
    return metrics | {
        f"{name}-truncated_ratio": statistics.fmean(
            float(s.completion.finish is Finish.length) for s in samples
        ),
        f"{name}-none_reward_ratio": statistics.fmean(float(not s.verdict.valid) for s in samples),
        f"{name}/response_len/mean": statistics.fmean(len(s.completion.tokens) for s in samples),
    }


def estimates(eval_set: EvalSet, groups: Sequence[Group]) -> dict[str, Estimate]:
    """mean@n of the reward, and pass@k for k = 1, 2, 4, ... n. An answer without a verdict has
    not passed."""
    num = eval_set.samples_per_prompt
    found = {f"mean@{num}": pass_rate.mean([statistics.fmean(g.rewards) for g in groups])}
    num_right = [sum(r >= eval_set.pass_reward for r in group.rewards) for group in groups]
    for k in pass_rate.ks(num):
        passed = [pass_rate.pass_at_k(num, right, k) for right in num_right]
        found[f"pass@{k}"] = pass_rate.rate(passed)
    return found
