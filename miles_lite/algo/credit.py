"""Who gets the credit: rewards of a group become advantages of its samples' tokens."""

from __future__ import annotations

import math
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

from miles_lite.protocols import Metrics
from miles_lite.types import Finish, Group, Sample, TrainSequence

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float]:
    """GRPO: r - mean, over (std + 1e-6) with the unbiased std (ddof = 1) if asked for.

    A group of one, or of equal rewards, has exactly zero advantage: there is nothing to compare.
    """
    assert all(map(math.isfinite, rewards)), f"rewards {rewards} are not all finite"
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)  # the rounded mean could leave 1e-17, and "zero" be untrue
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + STD_EPS if normalize_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def to_sequences(groups: Sequence[Group], *, normalize_std: bool) -> list[TrainSequence]:
    """Every sample of a step as the loss sees it, in rollout order; index in the list = `sample`.

    Samples of zero advantage stay: they are part of the batch that is averaged over. The answer to
    a failed verifier stays too, with the reward its verdict carries (0).
    """
    sequences: list[TrainSequence] = []
    for group in groups:
        advantages = group_advantages(group.rewards, normalize_std=normalize_std)
        for sample, advantage in zip(group.samples, advantages, strict=True):
            prompt, answer = sample.prompt, sample.completion
            where = f"sample {len(sequences)} (prompt {prompt.uid})"
            assert answer.finish is not Finish.abort, f"{where} was aborted: it has no full answer"
            assert len(answer.tokens) == len(answer.logprobs), f"{where}: tokens without log-probs"
            sequences.append(
                TrainSequence(
                    tokens=prompt.tokens + answer.tokens,
                    prompt_len=len(prompt.tokens),
                    logprobs=answer.logprobs,
                    advantage=advantage,
                    sample=len(sequences),
                )
            )
    return sequences


# ------------------------------------------------------------------ what a rollout looked like


def rollout_metrics(groups: Sequence[Group], *, normalize_std: bool) -> Metrics:
    """`rollout/*` and `reward/*` of one step; names are a contract with users' dashboards.

    Ratios and "percentages" are shares in [0, 1]. `rollout/raw_reward` is what the verdicts say,
    `rollout/rewards` what training uses; with GRPO the advantage of a token is the latter, and its
    mean is 0 by construction: look at std and max.
    """
    samples = [sample for group in groups for sample in group.samples]
    advantages = [
        advantage
        for group in groups
        for advantage in group_advantages(group.rewards, normalize_std=normalize_std)
    ]
    answers = [sample.completion for sample in samples]
    return {
        "rollout/raw_reward": statistics.fmean(sample.verdict.reward for sample in samples),
        "rollout/rewards": statistics.fmean(advantages),
        "rollout/advantages": statistics.fmean(advantages),
        "rollout/advantages_std": statistics.pstdev(advantages),
        "rollout/advantages_max": max(advantages),
        **_summary("rollout/response_len", [len(answer.tokens) for answer in answers]),
        "rollout/total_lengths": statistics.fmean(
            len(sample.prompt.tokens) + len(sample.completion.tokens) for sample in samples
        ),
        "rollout/truncated_ratio": _share(answer.finish is Finish.length for answer in answers),
        "rollout/repetition_frac": _share(is_repetitive(sample.text) for sample in samples),
        **_zero_std_metrics(groups),
        **_summary("rollout/weight_version", [answer.version for answer in answers]),
        "rollout/weight_version/mixed_version_ratio": _share(
            len({sample.completion.version for sample in group.samples}) > 1 for group in groups
        ),
        **_verdict_metrics(samples),
    }


def is_repetitive(text: str) -> bool:
    """Whether the end of a text runs in circles: its last 10,000 characters deflate to under 10 %.

    Prose and derivations deflate to 30-50 %. Below 1,000 characters a short list would look the
    same as a loop, so nothing is said of it.
    """
    tail = text[-10_000:].encode(errors="replace")
    return len(tail) >= 1_000 and len(zlib.compress(tail)) * 10 < len(tail)


def _zero_std_metrics(groups: Sequence[Group]) -> Metrics:
    """Groups that teach nothing since all their rewards are equal, counted by reward to 0.1."""
    flat = [group.rewards[0] for group in groups if len(set(group.rewards)) == 1]
    counts = Counter(round(reward, 1) + 0.0 for reward in flat)  # + 0.0: no "-0.0"
    return {
        "rollout/zero_std/all_zero_percentage": flat.count(0.0) / len(groups),
        "rollout/zero_std/all_one_percentage": flat.count(1.0) / len(groups),
        **{f"rollout/zero_std/count_{reward}": float(n) for reward, n in sorted(counts.items())},
    }


def _verdict_metrics(samples: Sequence[Sample]) -> Metrics:
    """Shares of answers that no verdict was reached on, in all and by reason."""
    reasons = Counter(sample.verdict.reason for sample in samples if not sample.verdict.valid)
    return {
        "reward/invalid_ratio": reasons.total() / len(samples),
        **{f"reward/invalid/{why}": n / len(samples) for why, n in sorted(reasons.items())},
    }


def _summary(name: str, values: Sequence[int]) -> Metrics:
    return {
        f"{name}/mean": statistics.fmean(values),
        f"{name}/median": float(statistics.median(values)),
        f"{name}/max": float(max(values)),
        f"{name}/min": float(min(values)),
    }


def _share(flags: Iterable[bool]) -> float:
    return statistics.fmean(map(float, flags))
