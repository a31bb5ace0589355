"""The drift of a step, split on a few of its samples into parts that were measured.

An answer has three log-probs a token, of the same weights: as it was decoded (the headline's), as
the engine's prefill scores it, and the trainer's. Between the first two lie the decode kernels,
between the last two everything in which engine and trainer differ. All three are of the policy's
distribution; two more prefills tell how far that is from what top-p and top-k leave of it, and from
that of temperature 1, and what is left of the drift if the decoded ones are of that by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from miles_lite.algo.routing import choices
from miles_lite.protocols import Metrics, Rescored, TokenValues
from miles_lite.types import Completion, Group, Routing, Sample

EXPLAINED = 0.2  # share of a difference: what leaves less of it is what it comes from
SAME = 1e-5  # nats a token, between two prefills of the same tokens in the same batch


def spread(groups: Sequence[Group], num: int) -> dict[int, Sample]:
    """`num` samples that lie evenly over a step, by their place in rollout order."""
    samples = [sample for group in groups for sample in group.samples]
    num = min(num, len(samples))
    return {i: samples[i] for i in (place * len(samples) // num for place in range(num))}


def drift_parts(
    samples: Mapping[int, Sample],
    rescored: Rescored,
    trainer: TokenValues,
    version: int,
) -> Metrics:
    """drift/*, as the headline: means over samples of the mean |difference| over their tokens.

    Of those of `samples` that the trainer saw, as far as each was scored; where the engine cannot
    score, or there is none, only what needs neither. A part that was not measured is not there.
    """
    if not samples:
        return {}
    drawn = [sample.completion for sample in samples.values()]
    metrics: Metrics = {"drift/version_gap": float(max(abs(version - c.version) for c in drawn))}
    flips = [
        flip_rate(completion.routing, again.routing)
        for completion, again in zip(drawn, rescored.policy, strict=False)
        if again.routing.known
    ]
    if flips:
        metrics["drift/decode_prefill_flips"] = fmean(flips)
    trained = {place: trainer[i] for place, i in enumerate(samples) if len(trainer.get(i, ()))}
    if not (rescored.policy and trained):
        return metrics

    def scores(completions: Sequence[Completion]) -> list[np.ndarray]:
        return [np.array(completions[place].logprobs) for place in trained]

    prefill = scores(rescored.policy)
    decode = [row[: len(p)] for row, p in zip(scores(drawn), prefill, strict=True)]
    ours = [row[: len(p)] for row, p in zip(trained.values(), prefill, strict=True)]
    metrics |= {
        "drift/decode_vs_prefill": _apart(decode, prefill),
        "drift/prefill_vs_trainer": _apart(prefill, ours),
        "drift/decode_vs_trainer": _apart(decode, ours),
        "drift/samples": float(len(trained)),
    }
    # rounding has no sign, log-probs of another distribution have
    shifts = [float((d - p).mean()) for d, p in zip(decode, prefill, strict=True)]
    metrics["drift/decode_shift"] = fmean(shifts)
    others = {"temperature": rescored.untempered, "truncation": rescored.truncated}
    for name, completions in others.items():
        if completions:
            shift = [other - p for other, p in zip(scores(completions), prefill, strict=True)]
            metrics[f"drift/{name}"] = fmean(float(np.abs(s).mean()) for s in shift)
            rest = [d - s for d, s in zip(decode, shift, strict=True)]
            metrics[f"drift/without_{name}"] = _apart(rest, ours)
    return metrics


def _apart(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    return fmean(float(np.abs(x - y).mean()) for x, y in zip(a, b, strict=True))


def suspect(metrics: Metrics) -> str:
    """Where most of a drift that is too large lies, in words; "" if its parts were not measured."""

    def part(name: str) -> float:
        return metrics.get(f"drift/{name}", math.nan)

    if (versions := part("version_gap")) > 0:  # the other parts follow from that
        return f"the engine's weights and the policy are {versions:g} versions apart"
    drift, within, beyond = map(
        part, ("decode_vs_trainer", "decode_vs_prefill", "prefill_vs_trainer")
    )
    if part("without_truncation") < EXPLAINED * drift:
        return "the engine's log-probs are those among the tokens that top-p and top-k keep"
    if part("without_temperature") < EXPLAINED * drift:
        return "the engine's log-probs are those of temperature 1"
    if part("temperature") < SAME:
        return "the engine's log-probs do not depend on the temperature"
    if within > beyond:
        return "the engine's decoding disagrees with its own prefill"
    return "the engine's prefill disagrees with the trainer" if beyond >= within else ""


def flip_rate(one: Routing, other: Routing) -> float:
    """Share of (token, layer) whose sets of experts differ, of the tokens that both tell of."""
    num_tokens = min(one.shape[0], other.shape[0])
    a, b = (np.sort(choices(routing)[:num_tokens], axis=-1) for routing in (one, other))
    return float((a != b).any(-1).mean()) if a.size else 0.0
