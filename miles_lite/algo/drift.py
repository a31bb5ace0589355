"""How far two policies that should be one have drifted apart, per token and per sample.

Twice in a step: the engine that drew the tokens against the trainer's forward pass of the same
weights (numerics; anything large is a bug), and the policy in training against the one before the
first update (off-policyness).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miles_lite.algo.losses import kl_estimate
from miles_lite.metrics import ABS_DIFF, Max, Mean, Partial, Sum


@torch.no_grad()
def rollout_drift(trainer: Tensor, rollout: Tensor, lengths: Sequence[int]) -> dict[str, Partial]:
    """Partials of trainer against engine log-probs [N] of the same response tokens.

    `train_rollout_logprob_abs_diff` is |trainer - rollout| and `train_rollout_kl` the clamped k3
    estimate of KL(rollout || trainer), both as the mean over samples of the mean over their tokens:
    of all samples, however the loss weighs them. Tokens with a non-finite log-prob on either side
    are left out of both and counted in `nonfinite_logprobs`: a mean without its count says nothing.
    Where nothing is left, or nothing was given, the means are NaN.
    """
    # Where "old log-probs" are borrowed from the engine both names reach the same numbers, and the
    # drift would read as a perfect 0 for ever.
    same = trainer is rollout or (trainer.numel() and trainer.data_ptr() == rollout.data_ptr())
    assert not same, "drift of a tensor to itself: pass the trainer's log-probs and the engine's"
    assert trainer.shape == rollout.shape
    finite = trainer.isfinite() & rollout.isfinite()
    trainer, rollout = (x.double().masked_fill(~finite, 0) for x in (trainer, rollout))
    diff = (trainer - rollout).abs()
    kl = kl_estimate(rollout, trainer, "low_var_kl")

    def sums(tokens: Tensor) -> Tensor:  # [B]
        return _by_sample(tokens, lengths, torch.sum)

    counts = sums(finite.double())
    largest = diff.masked_fill(~finite, -torch.inf)
    # One transfer from the device for all five.
    total_diff, total_kl, num_samples, max_diff, broken = torch.stack(
        [
            (sums(diff) / counts.clamp(min=1)).sum(),
            (sums(kl) / counts.clamp(min=1)).sum(),
            (counts > 0).sum().double(),
            largest.max() if largest.numel() else largest.new_tensor(-torch.inf),
            (~finite).sum().double(),
        ]
    ).tolist()
    return {
        ABS_DIFF: Mean(total_diff, num_samples),
        f"{ABS_DIFF}_max": Max(max_diff),
        "train/train_rollout_kl": Mean(total_kl, num_samples),
        "train/nonfinite_logprobs": Sum(broken),
    }


@torch.no_grad()
def update_drift(current: Tensor, old: Tensor, lengths: Sequence[int]) -> dict[str, Partial]:
    """`ess_ratio` of current against old log-probs [N], averaged over samples with a response.

    1 on the first update of a rollout; NaN when a log-prob is, as is the loss of that update.
    """
    assert current is not old, "drift of a tensor to itself"
    ratios = ess_ratios(current - old, lengths).tolist()
    told = [ratio for ratio, length in zip(ratios, lengths, strict=True) if length]
    return {"train/ess_ratio": Mean(sum(told), len(told))}


@torch.no_grad()
def first_log_ratio(current: Tensor, old: Tensor) -> dict[str, Partial]:
    """Mean |current - old| of log-probs [N] in the first update of a step, where both are of the
    same weights: rounding, unless training computes something else than scoring does."""
    return {"train/first_log_ratio": Mean((current - old).abs().sum().item(), current.numel())}


@torch.no_grad()
def ess_ratios(log_weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B] effective sample size (sum w)^2 / (n sum w^2) of each run of `lengths` tokens, in (0, 1].

    log w [N] is the log-ratio of the importance weights, current - old for an update. A common
    factor cancels, so each sample is scaled by its largest weight and nothing overflows. NaN for a
    sample without tokens.
    """
    assert sum(lengths) == log_weights.numel()
    return _by_sample(log_weights.double(), lengths, _ess)


def _ess(log_weights: Tensor) -> Tensor:
    if not log_weights.numel():
        return log_weights.new_tensor(torch.nan)
    w = (log_weights - log_weights.max()).exp()
    return w.sum().square() / (w.numel() * w.square().sum())


def _by_sample(
    values: Tensor, lengths: Sequence[int], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """[B] `reduce` of each run of `lengths` values [N]; B may be 0, where no sample is trained."""
    return torch.cat([values[:0], *(reduce(part)[None] for part in values.split(list(lengths)))])
