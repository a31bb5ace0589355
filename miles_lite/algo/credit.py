"""Who gets the credit: rewards of a group become advantages of its samples' tokens.

What needs the trainer's log-probs, KL in the reward and whitening, comes later: `returns`.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from miles_lite.algo.marks import ANSWER, BOXED, THINK_END, Mark, wanted_marks, wanted_shares
from miles_lite.config import Config
from miles_lite.protocols import Metrics
from miles_lite.types import Finish, Group, Sample, TrainSequence

Estimator = Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]

STD_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class CreditSettings:
    """config.AlgoConfig's comments say what the fields mean."""

    estimator: Estimator
    normalize_std: bool
    drop_invalid: bool  # an answer without a verdict does not count; else it counts as 0
    max_response_len: int
    overlong_buffer: int
    overlong_penalty: float
    overlong_filter: bool
    marks: Mapping[str, tuple[Mark, ...]] = field(default_factory=dict)  # wanted, by reward

    @classmethod
    def of(cls, cfg: Config) -> CreditSettings:
        return cls(
            estimator=cfg.algo.advantage_estimator,
            normalize_std=cfg.algo.normalize_std,
            drop_invalid=cfg.reward.invalid != "wrong",
            max_response_len=cfg.rollout.max_response_tokens,
            overlong_buffer=cfg.algo.overlong_buffer,
            overlong_penalty=cfg.algo.overlong_penalty,
            overlong_filter=cfg.algo.overlong_filter,
            marks=wanted_marks(cfg.reward),
        )


def advantages(
    rewards: Sequence[float],
    groups: Sequence[int],
    *,
    estimator: Estimator,
    normalize_std: bool,
) -> list[float]:
    """[samples] from each sample's reward and the group it belongs to, with n samples in a group:

    grpo: (r - mean) / (std + 1e-6), the std unbiased (DeepSeekMath, 2024, 4.1.2); without
        `normalize_std` r - mean (Dr.GRPO: Liu et al. 2025, section 3.2).
    rloo: r - mean of the other n - 1 (Ahmadian et al. 2024, equation 8).
    reinforce_plus_plus: r; its baseline is the mean over the batch (Hu et al. 2025), which
        whitening takes. reinforce_plus_plus_baseline: r - mean, and then the same.

    Compared with nobody, or with its equals, a sample has exactly zero advantage.
    """
    assert all(map(math.isfinite, rewards)), f"rewards {rewards} are not all finite"
    if estimator == "reinforce_plus_plus":
        return list(rewards)
    members: dict[int, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward)
    baseline = {group: statistics.fmean(values) for group, values in members.items()}
    scale = {group: _scale(values, estimator, normalize_std) for group, values in members.items()}
    return [
        (reward - baseline[group]) * scale[group]
        for reward, group in zip(rewards, groups, strict=True)
    ]


def _scale(rewards: Sequence[float], estimator: Estimator, normalize_std: bool) -> float:
    """What r - mean is multiplied with in a group."""
    if len(set(rewards)) == 1:
        return 0.0  # the rounded mean could leave 1e-17, and "zero" be untrue
    if estimator == "rloo":
        return len(rewards) / (len(rewards) - 1)  # the same as leaving the sample out of the mean
    if estimator == "grpo" and normalize_std:
        return 1 / (statistics.stdev(rewards) + STD_EPS)
    return 1.0


def overlong_penalty(response_len: int, settings: CreditSettings) -> float:
    """What an answer pays for using up its tokens: nothing before the last `overlong_buffer` of
    them, then linearly up to `overlong_penalty` (DAPO: Yu et al. 2025, equation 13)."""
    if not settings.overlong_buffer:
        return 0.0
    excess = response_len - (settings.max_response_len - settings.overlong_buffer)
    return settings.overlong_penalty * max(0.0, excess / settings.overlong_buffer)


def to_sequences(groups: Sequence[Group], settings: CreditSettings) -> list[TrainSequence]:
    """Every sample of a step as the loss sees it, in rollout order; index in the list = `sample`.

    Samples of zero advantage count: they are part of the batch that is averaged over. What has no
    verdict does not, unless it is to count as wrong, and is no part of its group's baseline either;
    an over-long answer is, even if it is filtered.
    """
    samples = [(index, sample) for index, group in enumerate(groups) for sample in group.samples]
    rewards = [
        sample.verdict.reward - overlong_penalty(len(sample.completion.tokens), settings)
        for _, sample in samples
    ]
    judged = [i for i, (_, s) in enumerate(samples) if s.verdict.valid or not settings.drop_invalid]
    values = advantages(
        [rewards[i] for i in judged],
        [samples[i][0] for i in judged],
        estimator=settings.estimator,
        normalize_std=settings.normalize_std,
    )
    found = dict(zip(judged, values, strict=True))
    sequences = []
    for i, (group, sample) in enumerate(samples):
        too_long = settings.overlong_filter and sample.completion.finish is Finish.length
        counts = i in found and not too_long
        advantage = found[i] if counts else 0.0
        sequences.append(_sequence(sample, i, group, rewards[i], advantage, counts))
    return sequences


def _sequence(
    sample: Sample, index: int, group: int, reward: float, advantage: float, counts: bool
) -> TrainSequence:
    prompt, answer = sample.prompt, sample.completion
    where = f"sample {index} (prompt {prompt.uid})"
    assert answer.finish is not Finish.abort, f"{where} was aborted: it has no full answer"
    assert len(answer.tokens) == len(answer.logprobs), f"{where}: tokens without log-probs"
    return TrainSequence(
        tokens=prompt.tokens + answer.tokens,
        prompt_len=len(prompt.tokens),
        logprobs=answer.logprobs,
        sample=index,
        group=group,
        reward=reward,
        advantage=advantage,
        counts=counts,
        routing=answer.routing,
    )


# ------------------------------------------------------------------ what a rollout looked like


def rollout_metrics(
    groups: Sequence[Group], sequences: Sequence[TrainSequence], settings: CreditSettings
) -> Metrics:
    """`rollout/*` and `reward/*` of one step; names are a contract with users' dashboards.

    Ratios and "percentages" are shares in [0, 1]. `rollout/raw_reward` is what the verdicts say,
    over the samples that have one; `rollout/taught_ratio` the share of samples that tell right from
    wrong. `rollout/rewards` is what the loss starts from, over the samples that count; with GRPO
    its mean is 0 by construction: look at std and max. Where there is no such sample these are
    missing.
    """
    samples = [sample for group in groups for sample in group.samples]
    verdicts = [sample.verdict.reward for sample in samples if sample.verdict.valid]
    used = [s.advantage for s in sequences if s.counts]
    answers = [sample.completion for sample in samples]
    raw = {"rollout/raw_reward": statistics.fmean(verdicts)} if verdicts else {}
    return {
        **raw,
        **(_advantage_metrics(used) if used else {}),
        **_summary("rollout/response_len", [len(answer.tokens) for answer in answers]),
        "rollout/total_lengths": statistics.fmean(len(s.tokens) for s in sequences),
        "rollout/truncated_ratio": _share(answer.finish is Finish.length for answer in answers),
        "rollout/repetition_frac": _share(is_repetitive(sample.text) for sample in samples),
        "rollout/not_counted_ratio": _share(not s.counts for s in sequences),
        "rollout/zero_advantage_ratio": _share(s.counts and not s.advantage for s in sequences),
        "rollout/taught_ratio": _taught_ratio(samples, sequences, settings),
        **{f"rollout/marker/{name}": share for name, share in _marker_shares(samples).items()},
        **{
            f"rollout/wanted_marks/{reward}": share
            for reward, share in wanted_shares(samples, settings.marks).items()
        },
        **_zero_std_metrics(groups),
        **_summary("rollout/weight_version", [answer.version for answer in answers]),
        "rollout/weight_version/mixed_version_ratio": _share(
            len({sample.completion.version for sample in group.samples}) > 1 for group in groups
        ),
        **_verdict_metrics(samples),
    }


def _advantage_metrics(used: Sequence[float]) -> Metrics:
    return {
        "rollout/rewards": statistics.fmean(used),
        "rollout/advantages_std": statistics.pstdev(used),
        "rollout/advantages_max": max(used),
    }


_MARKERS = {"think_end": THINK_END, "boxed": BOXED, "answer": ANSWER}


def _marker_shares(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        name: _share(mark.is_in(sample) for sample in samples) for name, mark in _MARKERS.items()
    }


def _taught_ratio(
    samples: Sequence[Sample], sequences: Sequence[TrainSequence], settings: CreditSettings
) -> float:
    """Share of answers with a say about right and wrong: they count, their advantage is not zero,
    and the verdicts of those they are compared with differ. Where only length was shaped these do
    not; equal advantages are all zero, or whitened to zero."""
    over_batch = settings.estimator == "reinforce_plus_plus"  # whose baseline is the batch's mean
    verdicts: dict[int, set[float]] = defaultdict(set)  # by group, or of the batch
    for sample, sequence in zip(samples, sequences, strict=True):
        if sample.verdict.valid or not settings.drop_invalid:
            verdicts[0 if over_batch else sequence.group].add(sample.verdict.reward)
    if len({s.advantage for s in sequences if s.counts}) < 2:
        return 0.0
    return _share(
        s.counts
        and (over_batch or s.advantage != 0)
        and len(verdicts[0 if over_batch else s.group]) > 1
        for s in sequences
    )


def dead_step_reason(groups: Sequence[Group]) -> str:
    """What the answers of a step without signal look like, for a message."""
    samples = [sample for group in groups for sample in group.samples]
    verdicts = [sample.verdict.reward for sample in samples if sample.verdict.valid]
    reasons = Counter(sample.verdict.reason for sample in samples if not sample.verdict.valid)
    cut = _share(sample.completion.finish is Finish.length for sample in samples)
    said = [f"{n} of {len(samples)} answers without verdict ({why})" for why, n in reasons.items()]
    if verdicts:
        said.append(f"rewards between {min(verdicts):g} and {max(verdicts):g}, equal in each group")
    said.append(f"{cut:.0%} cut at the length limit")
    said += [f"{share:.0%} with {name}" for name, share in _marker_shares(samples).items()]
    return ", ".join(said)


def is_repetitive(text: str) -> bool:
    """Whether the end of a text runs in circles: its last 10,000 characters deflate to under 10 %.

    Prose and derivations deflate to 30-50 %. Below 1,000 characters a short list would look the
    same as a loop, so nothing is said of it.
    """
    tail = text[-10_000:].encode(errors="replace")
    return len(tail) >= 1_000 and len(zlib.compress(tail)) * 10 < len(tail)


def _zero_std_metrics(groups: Sequence[Group]) -> Metrics:
    """Groups that teach nothing since all their rewards are equal, counted by reward to 0.1."""
    verdicts = [[s.verdict.reward for s in group.samples if s.verdict.valid] for group in groups]
    flat = [rewards[0] for rewards in verdicts if len(set(rewards)) == 1]
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
