"""What n samples of each of P prompts say of a model, and how surely. Pure Python.

The prompts are the draw: samples of one prompt resemble each other, so what varies between prompts
is the error, and more samples of few prompts make no narrow interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_Z = 1.959964  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    low: float  # of the 95 % interval
    high: float


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that of k samples, drawn from these without putting back, one at least is right: the
    unbiased estimate 1 - C(n-c, k) / C(n, k) of Chen et al., 2021 (Codex)."""
    if not 0 < k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: wanted 0 < k <= samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def ks(num_samples: int) -> Iterator[int]:
    """1, 2, 4, ... below num_samples, and num_samples."""
    k = 1
    while k < num_samples:
        yield k
        k *= 2
    yield num_samples


def mean(values: Sequence[float]) -> Estimate:
    """Of one value a prompt, whatever the values are."""
    value = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(value, -math.inf, math.inf)
    half = _t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(value, value - half, value + half)


def rate(values: Sequence[float]) -> Estimate:
    """Of one value in [0, 1] a prompt: Wilson's interval with as many trials as would have this
    standard error, which is sound near 0 and 1, where few prompts differ by chance, too."""
    value, num_prompts = statistics.fmean(values), len(values)
    trials = float(num_prompts)
    if num_prompts > 1 and 0 < value < 1:
        variance = statistics.variance(values) / num_prompts
        # equal values of all prompts are not certainty: of P prompts there is no more to be known
        # than of P times as many as one prompt can tell apart, and 4 is few enough
        trials = min(value * (1 - value) / variance if variance else math.inf, 4.0 * num_prompts)
    z = _t(num_prompts - 1) if num_prompts > 1 else _Z
    middle = (value + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = value * (1 - value) / trials + (z / (2 * trials)) ** 2
    half = z / (1 + z * z / trials) * math.sqrt(spread)
    return Estimate(value, max(0.0, middle - half), min(1.0, middle + half))


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Cornish and Fisher's expansion: 2 % too small at 3
    degrees of freedom, 0.1 % at 8."""
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
