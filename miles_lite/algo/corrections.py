"""Importance correction between the engine that drew the tokens and the trainer that learns.

Both hold the same weights and still give a token slightly different probabilities. The ratio
trainer / engine can weigh the policy gradient (TIS: Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"; IcePop: Ling team 2025) or mask what is out of range
and sequences with a hopeless token (Liu, Li et al. 2025, "When Speed Kills Stability").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miles_lite.config import CorrectionConfig

LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: far outside any range, far inside float32


@torch.no_grad()
def correct(
    old: Tensor, rollout: Tensor, lengths: Sequence[int], settings: CorrectionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """([N] factor of each token's policy gradient, {metric: [N] values to be averaged}).

    old, rollout: [N] log-probs of trainer and engine under the same weights, sequence after
    sequence. A factor of 0 takes a token out of the loss, not out of its denominator.
    """
    log_ratio = old - rollout
    factor, told = torch.ones_like(log_ratio), {}
    if settings.weight != "none":
        ratio = _ratio(log_ratio, lengths, settings.weight)
        kept = ratio.clamp(settings.low, settings.high)
        if settings.outside == "mask":
            kept = ratio * (kept == ratio)
        factor = factor * kept
        told["train/tis"] = ratio
        told["train/tis_clipfrac"] = kept != ratio
        told["train/tis_abs"] = (ratio - 1).abs()
    if settings.reject != "none":
        ratio = _ratio(log_ratio, lengths, settings.reject)
        below, above = ratio < settings.reject_low, ratio > settings.reject_high
        factor = factor * ~(below | above)
        told["train/mis_mask_fraction_low"] = below
        told["train/mis_mask_fraction_high"] = above
    if settings.veto:
        hopeless = log_ratio < math.log(settings.veto)  # the bound on ratios has no say in this
        vetoed = over_sequences(hopeless, lengths, torch.any)
        factor = factor * ~vetoed
        told["train/mis_catastrophic_token_fraction"] = hopeless
        told["train/mis_catastrophic_seq_fraction"] = vetoed
    return factor, told


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio that is kept in +-20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def over_sequences(
    values: Tensor, lengths: Sequence[int], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """[N] with `reduce` of the values of its whole sequence in each token's place."""
    # Not index_add: on CUDA the order of its additions, so the last bit, is a matter of chance.
    return torch.cat([reduce(part).expand_as(part) for part in values.split(list(lengths))])


def _ratio(log_ratio: Tensor, lengths: Sequence[int], level: str) -> Tensor:
    """[N] ratios: of the token, of its sequence, or the geometric mean over its sequence."""
    if level == "sequence":
        log_ratio = over_sequences(log_ratio, lengths, torch.sum)
    elif level == "geometric":
        log_ratio = over_sequences(log_ratio, lengths, torch.mean)
    else:
        assert level == "token", f"no level {level!r}"
    return bounded_ratio(log_ratio)
