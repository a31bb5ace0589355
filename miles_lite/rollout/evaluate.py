"""Held-out accuracy of the policy as the engines serve it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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


def evaluate(rollout: RolloutManager, eval_set: EvalSet) -> tuple[Metrics, list[Group]]:
    """eval/{name} is the mean reward, over samples of each prompt and then over prompts.

    Seeds do not depend on the step: two evaluations differ by the weights alone.
    """
    groups = rollout.sample(
        eval_set.prompts, eval_set.sampling, eval_set.samples_per_prompt, f"eval/{eval_set.name}"
    )
    samples = [sample for group in groups for sample in group.samples]
    name = f"eval/{eval_set.name}"
    return {
        name: statistics.fmean(statistics.fmean(group.rewards) for group in groups),
        f"{name}-truncated_ratio": statistics.fmean(
            float(s.completion.finish is Finish.length) for s in samples
        ),
        f"{name}-none_reward_ratio": statistics.fmean(float(not s.verdict.valid) for s in samples),
        f"{name}/response_len/mean": statistics.fmean(len(s.completion.tokens) for s in samples),
    }, groups
