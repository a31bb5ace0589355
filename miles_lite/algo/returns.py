"""Advantages of tokens, where they depend on the trainer's own log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles_lite.algo.credit import Estimator

VARIANCE_EPS = 1e-8


def token_advantages(
    advantages: Tensor,
    kl: Tensor,
    lengths: Sequence[int],
    *,
    estimator: Estimator,
    kl_coef: float,
) -> Tensor:
    """[N] from advantages [B] of samples and KL estimates [N] of their response tokens.

    reinforce_plus_plus: A_t = r - kl_coef x sum of kl from t on, the return of a reward at the end
        and a penalty at each token (Hu et al. 2025, gamma = 1).
    reinforce_plus_plus_baseline: A_t = (r - mean) - kl_coef x kl_t.
    grpo, rloo: A_t = A: they compare whole samples, whose rewards have paid for the KL already.
    """
    tokens = advantages.repeat_interleave(torch.tensor(lengths, device=advantages.device))
    if estimator == "reinforce_plus_plus":
        to_come = [part.flip(0).cumsum(0).flip(0) for part in kl.split(list(lengths))]
        return tokens - kl_coef * torch.cat(to_come)
    if estimator == "reinforce_plus_plus_baseline":
        return tokens - kl_coef * kl
    return tokens


def moments(values: Tensor, counts: Tensor) -> Tensor:
    """[3] number, sum and sum of squares, float64, of the values [N] that count (bool [N]).

    Sums over ranks are the moments of all; without values they are zeros.
    """
    chosen = values[counts].double()
    number = chosen.new_tensor(float(chosen.numel()))
    return torch.stack([number, chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, total: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) with the moments of all ranks; the variance unbiased."""
    number, first, second = total.to(values.device)
    mean = first / number.clamp(min=1)
    variance = (second - number * mean.square()).clamp(min=0) / (number - 1).clamp(min=1)
    return ((values.double() - mean) * (variance + VARIANCE_EPS).rsqrt()).to(values.dtype)
