"""The policy loss of one micro-batch, over the flat response tokens of its sequences.

N counts response tokens, B sequences, T the tokens of the packed stream. Every term is a plain sum
of weight x value, and the weights already hold the whole normalisation of the update: values,
metrics and gradients add up over micro-batches and data-parallel ranks, however they were packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from miles_lite.algo.corrections import LOG_RATIO_BOUND, bounded_ratio, correct, over_sequences
from miles_lite.config import AlgoConfig, CorrectionConfig
from miles_lite.metrics import Mean, Partial, Sum
from miles_lite.types import MicroBatch

KlType = Literal["k1", "k2", "k3", "low_var_kl"]

LOW_VAR_KL_BOUND = 10.0


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The part of config.AlgoConfig that a loss needs; its comments say what the fields mean."""

    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    eps_clip: float = 0.2  # the ratio is clipped from below at 1 - eps_clip
    eps_clip_high: float = 0.28  # and from above at 1 + eps_clip_high
    eps_clip_c: float = 0.0  # a token with A < 0 costs at most -c A; not for CISPO
    opsm_delta: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_type: KlType = "k3"
    use_unbiased_kl: bool = False
    entropy_coef: float = 0.0
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    @classmethod
    def of(cls, algo: AlgoConfig) -> LossSettings:
        return cls(**{each.name: getattr(algo, each.name) for each in fields(cls)})


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
    old: Tensor  # [N] before the first update of this rollout: where the ratio starts from
    rollout: Tensor  # [N] of the engine; read only by an active correction
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
    logprobs: LogProbs,
    advantages: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    settings: LossSettings,
) -> tuple[Tensor, dict[str, Partial]]:
    """The loss of whole sequences of `lengths` tokens, and its metrics.

    d = old - current ("ppo_kl"), ratio = exp(-d), and the objective of a token is
    ppo_clip: max(-ratio A, -clip(ratio) A), with a ceiling if A < 0 (dual clip);
    gspo: the same with d averaged over the sequence (Zheng et al. 2025);
    cispo: -clip(ratio) A current, the ratio a constant (MiniMax-M1, 2025).
    Off-policy masking and corrections multiply it. Then come kl_loss_coef x KL to the reference and
    minus entropy_coef x entropy, and all is summed with the token weights.

    Terms of the loss are told as `Sum`: with other weights than those of a mean they still add up
    to the loss. All else is a `Mean` under the same weights, but for `train/token_entropy`, which
    is in nats a token whatever the weights, over the tokens that are trained on.

    A non-finite log-prob is never smoothed over: loss and gradient become NaN and
    `train/nonfinite_logprobs` counts the tokens. The caller must not apply such an update.
    """
    current, broken = _poison(logprobs, settings)
    d = token_d = logprobs.old - current
    if settings.policy_loss == "gspo":
        d = over_sequences(d, lengths, torch.mean)
    ratio = bounded_ratio(-d)
    objective, clipped = _objective(ratio, current, advantages, settings)
    means = {"train/pg_clipfrac": clipped, "train/ppo_kl": d, "train/ois": ratio}
    if settings.opsm_delta:
        masked = _off_policy(token_d, advantages, lengths, settings.opsm_delta)
        objective = objective * ~masked
        means["train/opsm_clipfrac"] = masked
    if settings.correction.active:
        assert logprobs.old is not logprobs.rollout, "nothing to correct: the ratio starts there"
        factor, told = correct(logprobs.old, logprobs.rollout, lengths, settings.correction)
        objective = objective * factor
        means |= told
    loss = pg_loss = (weights * objective).sum()
    sums = {"train/pg_loss": pg_loss, "train/nonfinite_logprobs": broken}
    plain: dict[str, Tensor] = {}
    if logprobs.reference is not None:
        unbias = bounded_ratio(-token_d) if settings.use_unbiased_kl else None
        kl = kl_estimate(current, logprobs.reference, settings.kl_loss_type, unbias)
        sums["train/kl_loss"] = kl_loss = (weights * kl).sum()
        if settings.kl_loss_coef:
            loss = loss + settings.kl_loss_coef * kl_loss
    else:
        assert not settings.kl_loss_coef, "a KL loss needs the log-probs of a reference policy"
    if logprobs.entropy is not None:
        sums["train/entropy_loss"] = entropy_loss = (weights * logprobs.entropy).sum()
        plain["train/token_entropy"] = logprobs.entropy
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * entropy_loss
    else:
        assert not settings.entropy_coef, "an entropy bonus needs the entropy"
    return loss, _partials(sums | {"train/loss": loss}, means, plain, weights)


def kl_estimate(
    logprobs: Tensor, base: Tensor, kind: KlType, ratio: Tensor | None = None
) -> Tensor:
    """[N] estimates of KL(p || base) from tokens drawn from p (Schulman, "Approximating KL").

    With x = log p - log base: k1 = x; k2 = x^2 / 2; k3 = e^-x - 1 + x; low_var_kl = k3 with x kept
    in +-20 and the result in +-10. `ratio` is p over the policy that drew the tokens, where that is
    another one: times it, with its gradient, values and gradients are unbiased (DeepSeek-V3.2).
    """
    x = logprobs - base
    if kind == "low_var_kl":
        x = x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        kl = x
    elif kind == "k2":
        kl = x.square() / 2
    else:
        assert kind in ("k3", "low_var_kl"), f"no KL estimator {kind!r}"
        kl = torch.expm1(-x) + x  # e^-x - 1 would cancel to noise near x = 0
    if ratio is not None:
        kl = ratio * kl
    return kl.clamp(-LOW_VAR_KL_BOUND, LOW_VAR_KL_BOUND) if kind == "low_var_kl" else kl


def _objective(
    ratio: Tensor, current: Tensor, advantages: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """([N] policy gradient loss, [N] whether clipping has a say in it)."""
    # CISPO takes eps_clip >= 1 for no bound from below: a ratio is never negative
    limited = ratio.clamp(1 - settings.eps_clip, 1 + settings.eps_clip_high)
    if settings.policy_loss == "cispo":
        return -limited.detach() * advantages * current, limited != ratio
    plain, limited = -ratio * advantages, -limited * advantages
    loss = torch.maximum(plain, limited)
    if settings.eps_clip_c:
        assert settings.eps_clip_c > 1, f"dual clip at {settings.eps_clip_c} would cut ratio 1"
        ceiling = -settings.eps_clip_c * advantages
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return loss, limited > plain


@torch.no_grad()
def _off_policy(d: Tensor, advantages: Tensor, lengths: Sequence[int], delta: float) -> Tensor:
    """[N] whether the token's sequence is bad and the policy has left it behind (DeepSeek-V3.2).

    That is, its mean d exceeds delta; where advantages differ within a sequence, their mean counts.
    """
    bad = over_sequences(advantages, lengths, torch.mean) < 0
    return bad & (over_sequences(d, lengths, torch.mean) > delta)


def _poison(logprobs: LogProbs, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Current log-probs with NaN where one that the loss uses is not finite, and their number.

    The clamps would turn an infinite log-prob into a harmless ratio, and their backward a NaN into
    a zero gradient. A factor of NaN passes through both: 0 x NaN is NaN.
    """
    finite = logprobs.current.isfinite() & logprobs.old.isfinite()
    if logprobs.reference is not None:
        finite = finite & logprobs.reference.isfinite()
    if settings.correction.active:
        finite = finite & logprobs.rollout.isfinite()
    nan = torch.full_like(logprobs.current, torch.nan)
    factor = torch.where(finite, torch.ones_like(nan), nan)
    return logprobs.current * factor, (~finite).sum()


@torch.no_grad()
def _partials(
    sums: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    weights: Tensor,
) -> dict[str, Partial]:
    """Sums as they are, means [N] under the token weights and plain over the tokens that have one,
    in one transfer from the device."""
    weights = weights.double()
    trained = (weights != 0).double()
    totals = [weights.sum(), trained.sum(), *sums.values()]
    totals += [(weights * x).sum() for x in means.values()]
    totals += [(trained * x).sum() for x in plain.values()]
    weight, count, *values = torch.stack([total.double() for total in totals]).tolist()
    names = [*sums, *means, *plain]
    return {
        name: Sum(value) if name in sums else Mean(value, weight if name in means else count)
        for name, value in zip(names, values, strict=True)
    }
