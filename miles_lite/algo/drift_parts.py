"""The drift of a step, split on a few of its samples into parts that were measured.

An answer has three log-probs a token, of the same weights: as it was decoded (the headline's), as
the engine's prefill scores it, and the trainer's. Between the first two lie the decode kernels,
between the last two everything in which engine and trainer differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from miles_lite.algo.routing import choices
from miles_lite.protocols import Metrics
from miles_lite.types import Completion, Group, Routing, Sample


def spread(groups: Sequence[Group], num: int) -> dict[int, Sample]:
    """`num` samples that lie evenly over a step, by their place in rollout order."""
    samples = [sample for group in groups for sample in group.samples]
    num = min(num, len(samples))
    return {i: samples[i] for i in (place * len(samples) // num for place in range(num))}


def drift_parts(
    samples: Mapping[int, Sample],
    prefilled: Sequence[Completion] | None,
    trainer: Mapping[int, Sequence[float]],
    version: int,
) -> Metrics:
    """drift/*, as the headline: means over samples of the mean |difference| over their tokens.

    Of those of `samples` that the trainer saw, as far as each was scored; where the engine cannot
    score, or there is none, only what needs neither. A part that was not measured is not there.
    """
    if not samples:
        return {}
    drawn_by = [sample.completion.version for sample in samples.values()]
    metrics: Metrics = {"drift/version_gap": float(max(abs(version - v) for v in drawn_by))}
    if prefilled is None:
        return metrics
    pairs = list(zip(samples.items(), prefilled, strict=True))
    flips = [
        flip_rate(sample.completion.routing, again.routing)
        for (_, sample), again in pairs
        if again.routing.known
    ]
    if flips:
        metrics["drift/decode_prefill_flips"] = fmean(flips)
    seen = [
        tuple(
            np.array(logprobs[: len(again.logprobs)])
            for logprobs in (sample.completion.logprobs, again.logprobs, trainer[index])
        )
        for (index, sample), again in pairs
        if index in trainer and len(trainer[index])
    ]
    if not seen:
        return metrics
    shifts = {
        "drift/decode_vs_prefill": [decode - prefill for decode, prefill, _ in seen],
        "drift/prefill_vs_trainer": [prefill - ours for _, prefill, ours in seen],
        "drift/decode_vs_trainer": [decode - ours for decode, _, ours in seen],
    }
    for name, parts in shifts.items():
        metrics[name] = fmean(float(np.abs(part).mean()) for part in parts)
    # log-probs of a truncated distribution are too high on every token, rounding is on none
    decode_shift = fmean(float(part.mean()) for part in shifts["drift/decode_vs_prefill"])
    return metrics | {"drift/decode_shift": decode_shift, "drift/samples": float(len(seen))}


def flip_rate(one: Routing, other: Routing) -> float:
    """Share of (token, layer) whose sets of experts differ, of the tokens that both tell of."""
    num_tokens = min(one.shape[0], other.shape[0])
    a, b = (np.sort(choices(routing)[:num_tokens], axis=-1) for routing in (one, other))
    return float((a != b).any(-1).mean()) if a.size else 0.0
