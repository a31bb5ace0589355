"""The GRPO loss of one micro-batch, over the flat response tokens of its sequences.

N counts response tokens, B sequences, T the tokens of the packed stream. Every term is a plain sum
of weight x value, and the weights already hold the whole normalisation of the update: values,
metrics and gradients add up over micro-batches and data-parallel ranks, however they were packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles_lite.types import MicroBatch

KlType = Literal["k1", "k2", "k3", "low_var_kl"]

LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: far outside any clip range, far inside float32
LOW_VAR_KL_BOUND = 10.0


@dataclass(frozen=True, slots=True)
class LossSettings:
    eps_clip: float = 0.2  # the ratio is clipped from below at 1 - eps_clip
    eps_clip_high: float = 0.2  # and from above at 1 + eps_clip_high (DAPO: 0.28)
    eps_clip_c: float = 0.0  # dual clip: a token with A < 0 costs at most -c A; 0 is off, else > 1
    kl_loss_coef: float = 0.0  # of the KL to the reference policy; 0 needs no reference
    kl_loss_type: KlType = "k1"
    entropy_coef: float = 0.0  # the entropy bonus; 0 only observes the entropy


@dataclass(frozen=True, slots=True)
class Responses:
    """What a micro-batch says of its N response tokens, sequence after sequence."""

    logit_index: Tensor  # [N] positions in the packed [T] whose logits predict the response tokens
    targets: Tensor  # [N] the response tokens
    advantages: Tensor  # [N] float32
    weights: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32, of the engine
    lengths: tuple[int, ...]  # [B] response tokens of each sequence; sums to N


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Of the N response tokens, under temperature-scaled logits."""

    current: Tensor  # [N] of the policy in training; carries the gradient
    old: Tensor  # [N] of the trainer before the first update of this rollout
    reference: Tensor | None = None  # [N]; needed if kl_loss_coef is not 0
    entropy: Tensor | None = None  # [N]; needed, with gradient, if entropy_coef is not 0


def responses(micro_batch: MicroBatch, device: torch.device | str = "cpu") -> Responses:
    """Flatten a micro-batch; padding after its last token changes nothing.

    The logits at position t predict token t + 1, so those of a response lie one to the left of it,
    the first at the last prompt token.
    """
    index, targets, logprobs, start = [], [], [], 0
    for sequence in micro_batch.sequences:
        assert sequence.prompt_len > 0, f"sample {sequence.sample}: no prompt token to predict from"
        assert len(sequence.logprobs) == sequence.response_len, f"sample {sequence.sample}"
        end = start + len(sequence.tokens)
        index.append(torch.arange(start + sequence.prompt_len - 1, end - 1))
        targets.extend(sequence.tokens[sequence.prompt_len :])
        logprobs.extend(sequence.logprobs)
        start = end
    lengths = tuple(sequence.response_len for sequence in micro_batch.sequences)
    repeats = torch.tensor(lengths)
    advantages = torch.tensor([sequence.advantage for sequence in micro_batch.sequences])
    return Responses(
        logit_index=torch.cat(index).to(device),
        targets=torch.tensor(targets, dtype=torch.long).to(device),
        advantages=advantages.repeat_interleave(repeats).to(device),
        weights=torch.tensor(micro_batch.token_weights).repeat_interleave(repeats).to(device),
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32).to(device),
        lengths=lengths,
    )


def policy_loss(
    logprobs: LogProbs, advantages: Tensor, weights: Tensor, settings: LossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO-clip loss of the micro-batch and its metrics: detached scalars that sum to the update's.

    d = old - current ("ppo_kl"), ratio = exp(-d), L = max(-ratio A, -clip(ratio) A), summed with
    `weights`, plus kl_loss_coef x KL, minus entropy_coef x entropy. No aggregation happens here.

    A non-finite log-prob is never smoothed over: loss and gradient become NaN and
    `train/nonfinite_logprobs` counts the tokens. The caller must not apply such an update.
    """
    current, broken = _poison(logprobs)
    d = logprobs.old - current
    pg, clipped = _clipped_objective(d, advantages, settings)
    loss = pg_loss = (weights * pg).sum()
    metrics = {
        "train/pg_loss": pg_loss,
        "train/pg_clipfrac": (weights * clipped).sum(),
        "train/ppo_kl": (weights * d).sum(),
        "train/nonfinite_logprobs": broken,
    }
    if logprobs.reference is not None:
        kl = kl_estimate(current, logprobs.reference, settings.kl_loss_type)
        metrics["train/kl_loss"] = kl_loss = (weights * kl).sum()
        if settings.kl_loss_coef:
            loss = loss + settings.kl_loss_coef * kl_loss
    else:
        assert not settings.kl_loss_coef, "a KL loss needs the log-probs of a reference policy"
    if logprobs.entropy is not None:
        metrics["train/entropy_loss"] = entropy_loss = (weights * logprobs.entropy).sum()
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * entropy_loss
    else:
        assert not settings.entropy_coef, "an entropy bonus needs the entropy"
    metrics["train/loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def kl_estimate(logprobs: Tensor, base: Tensor, kind: KlType) -> Tensor:
    """[N] estimates of KL(p || base) from tokens drawn from p (Schulman, "Approximating KL").

    With x = log p - log base: k1 = x; k2 = x^2 / 2; k3 = e^-x - 1 + x; low_var_kl = k3 with x kept
    in +-20 and the result in +-10.
    """
    x = logprobs - base
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x  # e^-x - 1 would cancel to noise near x = 0
    assert kind == "low_var_kl", f"no KL estimator {kind!r}"
    x = x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (torch.expm1(-x) + x).clamp(-LOW_VAR_KL_BOUND, LOW_VAR_KL_BOUND)


def _clipped_objective(
    d: Tensor, advantages: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """([N] loss, [N] whether the clipped term is the larger one) from d = old - current."""
    ratio = (-d).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain = -ratio * advantages
    limited = -ratio.clamp(1 - settings.eps_clip, 1 + settings.eps_clip_high) * advantages
    loss = torch.maximum(plain, limited)
    if settings.eps_clip_c:
        assert settings.eps_clip_c > 1, f"dual clip at {settings.eps_clip_c} would cut ratio 1"
        ceiling = -settings.eps_clip_c * advantages
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return loss, limited > plain


def _poison(logprobs: LogProbs) -> tuple[Tensor, Tensor]:
    """Current log-probs with NaN where any log-prob of the token is not finite, and their number.

    The clamps would turn an infinite log-prob into a harmless ratio, and their backward a NaN into
    a zero gradient. A factor of NaN passes through both: 0 x NaN is NaN.
    """
    finite = logprobs.current.isfinite() & logprobs.old.isfinite()
    if logprobs.reference is not None:
        finite = finite & logprobs.reference.isfinite()
    nan = torch.full_like(logprobs.current, torch.nan)
    factor = torch.where(finite, torch.ones_like(nan), nan)
    return logprobs.current * factor, (~finite).sum().to(factor.dtype)
