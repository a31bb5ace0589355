"""Every combination of loss settings against a second implementation that shares no code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from miles_lite.algo.losses import KlType, LogProbs, LossSettings, policy_loss
from miles_lite.config import CorrectionConfig
from miles_lite.metrics import Mean, Partial, Sum

KL_TYPES: tuple[KlType, ...] = ("k1", "k2", "k3", "low_var_kl")
CORRECTIONS = {
    "none": CorrectionConfig(),
    "TIS": CorrectionConfig(weight="token"),
    "icepop": CorrectionConfig(weight="token", low=0.5, outside="mask"),
    "sequence weight": CorrectionConfig(weight="sequence", high=1.5),
    "sequence mask": CorrectionConfig(reject="sequence", reject_low=0.6, reject_high=1.7),
    "geometric mask, veto": CorrectionConfig(reject="geometric", veto=0.1),
}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """One tensor a sequence."""

    current: list[Tensor]
    old: list[Tensor]
    rollout: list[Tensor]
    reference: list[Tensor]
    entropy: list[Tensor]
    advantages: list[Tensor]


LENGTHS = (3, 1, 0, 4, 2, 2, 3)
WEIGHTS = {  # of each token of a sequence; the last sequence does not count
    "sample": [1 / (6 * max(1, n)) for n in LENGTHS[:-1]] + [0.0],
    "token": [1 / 13] * 6 + [0.0],
    "constant": [1 / (6 * 20)] * 6 + [0.0],
}


def planted() -> Sequences:
    """Random log-probs with a token on every side of every bound."""
    rng = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> list[Tensor]:
        return [scale * torch.randn(n, generator=rng, dtype=torch.float64) for n in LENGTHS]

    old = [values - 2 for values in drawn(0.5)]
    current = [a + b for a, b in zip(old, drawn(0.2), strict=True)]
    rollout = [a + b for a, b in zip(old, drawn(0.1), strict=True)]
    reference = [a + b for a, b in zip(old, drawn(0.5), strict=True)]
    by_sequence = (1.0, -1.0, 1.0, -2.0, 0.5, -0.7, 1.0)
    advantages = [a + 0 * values for a, values in zip(by_sequence, old, strict=True)]
    advantages[3][0] = 0.5  # as with REINFORCE++: of one sequence, of both signs
    current[0][0] = old[0][0] + 0.6  # above the clip range, A > 0
    current[1][0] = old[1][0] + 1.5  # above the ceiling of the dual clip, A < 0
    current[3] = old[3] - 0.5  # A < 0 and left behind
    rollout[0] = old[0] - 0.8  # trainer / engine: 2.2 in the geometric mean
    rollout[4] = old[4] + torch.tensor([-2.0, 3.0])  # a token of 0.05: vetoed; mean 0.6
    rollout[5] = old[5] - 0.35  # 2.0 of the sequence, 1.4 of each token
    reference[4][0] = current[4][0] + 3.5  # k3 beyond the bound of low_var_kl
    return Sequences(current, old, rollout, reference, drawn(1.0), advantages)


def loss_by_sequence(data: Sequences, weights: list[float], s: LossSettings) -> Tensor:
    """The definitions once more: what a sequence gains, as the papers have it."""
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        if not length:
            continue
        cur, old, adv = data.current[i], data.old[i], data.advantages[i]
        ratio = (cur - old).exp()
        if s.policy_loss == "gspo":
            ratio = ((cur - old).sum() / length).exp() * torch.ones_like(cur)
        low, high = torch.tensor([1 - s.eps_clip, 1 + s.eps_clip_high], dtype=torch.float64)
        clipped = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
        if s.policy_loss == "cispo":
            gain = clipped.detach() * adv * cur
        else:
            gain = torch.minimum(ratio * adv, clipped * adv)
            if s.eps_clip_c:
                gain = torch.where(adv < 0, torch.maximum(gain, s.eps_clip_c * adv), gain)
        left_behind = sum((old - cur).tolist()) / length > s.opsm_delta
        if s.opsm_delta and sum(adv.tolist()) < 0 and left_behind:
            gain = 0 * gain
        gain = gain * factors(old.tolist(), data.rollout[i].tolist(), s.correction)
        kl = kl_of_tokens(cur, old, data.reference[i], s)
        value = -gain + s.kl_loss_coef * kl - s.entropy_coef * data.entropy[i]
        total = total + weights[i] * value.sum()
    return total


def factors(old: list[float], rollout: list[float], c: CorrectionConfig) -> Tensor:
    logs = [a - b for a, b in zip(old, rollout, strict=True)]
    ratios = {
        "token": [math.exp(x) for x in logs],
        "sequence": [math.prod(math.exp(x) for x in logs)] * len(logs),
        "geometric": [math.exp(sum(logs) / len(logs))] * len(logs),
    }
    found = [1.0] * len(logs)
    for t in range(len(logs)):
        if c.weight != "none":
            ratio = ratios[c.weight][t]
            found[t] *= min(max(ratio, c.low), c.high)
            if c.outside == "mask" and not c.low <= ratio <= c.high:
                found[t] = 0.0
        if c.reject != "none" and not c.reject_low <= ratios[c.reject][t] <= c.reject_high:
            found[t] = 0.0
        if any(ratio < c.veto for ratio in ratios["token"]):
            found[t] = 0.0
    return torch.tensor(found, dtype=torch.float64)


def kl_of_tokens(cur: Tensor, old: Tensor, ref: Tensor, s: LossSettings) -> Tensor:
    x = cur - ref
    factor = (cur - old).exp() if s.use_unbiased_kl else torch.ones_like(cur)
    if s.kl_loss_type in ("k1", "k2"):
        return factor * (x if s.kl_loss_type == "k1" else x * x / 2)
    kl = factor * ((-x).exp() - 1 + x)
    return torch.where(kl > 10, torch.tensor(10.0), kl) if s.kl_loss_type == "low_var_kl" else kl


def test_every_combination_of_settings() -> None:
    """Value and gradient of each, and each setting but the dual clip of CISPO has an effect."""
    data = planted()
    flat = {f.name: torch.cat(getattr(data, f.name)) for f in dataclasses.fields(data)}
    leaves = flat["current"].requires_grad_(), flat["entropy"].requires_grad_()
    split = {"current": leaves[0].split(LENGTHS), "entropy": leaves[1].split(LENGTHS)}
    by_sequence = dataclasses.replace(data, **{name: list(x) for name, x in split.items()})
    advantages = flat.pop("advantages")
    repeats = torch.tensor(LENGTHS)
    told: dict[str, set[str]] = {"ppo_clip": set(), "gspo": set(), "cispo": set()}
    for policy, weights, kind, unbiased, correction, dual, delta in itertools.product(
        ("ppo_clip", "gspo", "cispo"),
        WEIGHTS.values(),
        KL_TYPES,
        (False, True),
        CORRECTIONS.values(),
        (0.0, 3.0),
        (0.0, 0.3),
    ):
        s = LossSettings(
            policy_loss=policy,
            eps_clip_c=dual,
            opsm_delta=delta,
            kl_loss_coef=0.1,
            kl_loss_type=kind,
            use_unbiased_kl=unbiased,
            entropy_coef=0.05,
            correction=correction,
        )
        w = torch.tensor(weights, dtype=torch.float64).repeat_interleave(repeats)
        loss, _ = policy_loss(LogProbs(**flat), advantages, w, LENGTHS, s)
        expected = loss_by_sequence(by_sequence, weights, s)
        found = torch.autograd.grad(loss, leaves)
        wanted = torch.autograd.grad(expected, leaves)
        assert abs(loss.item() - expected.item()) < 1e-10, s
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(found, wanted, strict=True)), s
        told[policy].add(f"{loss.item():.10f}")
    assert {policy: len(values) for policy, values in told.items()} == {
        "ppo_clip": 3 * 4 * 2 * 6 * 2 * 2,
        "gspo": 3 * 4 * 2 * 6 * 2 * 2,
        "cispo": 3 * 4 * 2 * 6 * 2,
    }


@pytest.mark.parametrize("policy", ["ppo_clip", "gspo"])
def test_finite_differences(policy: str) -> None:
    """No autograd on the other side. CISPO has a gradient that is not that of its value."""
    data = planted()
    cur, old, rollout, ref, entropy, adv = (
        torch.cat(getattr(data, f.name)) for f in dataclasses.fields(data)
    )
    s = LossSettings(
        policy_loss=policy,
        eps_clip_c=3.0,
        kl_loss_coef=0.1,
        kl_loss_type="low_var_kl",
        use_unbiased_kl=True,
        entropy_coef=0.05,
        correction=CORRECTIONS["TIS"],
    )

    def loss(current: Tensor, entropies: Tensor) -> Tensor:
        logprobs = LogProbs(current, old, rollout, ref, entropies)
        return policy_loss(logprobs, adv, torch.ones_like(adv), LENGTHS, s)[0]

    assert torch.autograd.gradcheck(loss, (cur.requires_grad_(), entropy.requires_grad_()))


def test_means_do_not_depend_on_what_the_weights_add_up_to() -> None:
    """Weights of a constant divisor do not sum to 1; a clipped share of 0.2 is 0.2 even so."""
    data = planted()
    flat = [torch.cat(getattr(data, f.name)) for f in dataclasses.fields(data)]
    advantages = flat.pop()
    s = LossSettings(
        opsm_delta=0.3,
        kl_loss_coef=0.1,
        entropy_coef=0.05,
        correction=CorrectionConfig(weight="token", veto=0.1),
    )

    def metrics(weight: float) -> dict[str, Partial]:
        weights = torch.full_like(advantages, weight)
        return policy_loss(LogProbs(*flat), advantages, weights, LENGTHS, s)[1]

    one, few = metrics(1 / len(advantages)), metrics(0.002)
    for name, partial in one.items():
        kind = "sum" if name.endswith(("loss", "nonfinite_logprobs")) else "mean"
        assert isinstance(partial, Sum if kind == "sum" else Mean), name
        if isinstance(partial, Mean):
            assert few[name].finish() == pytest.approx(partial.finish()), name
    assert few["train/loss"].finish() == pytest.approx(
        0.002 * len(advantages) * one["train/loss"].finish()
    )
    d = torch.cat(data.old) - torch.cat(data.current)
    assert one["train/ppo_kl"].finish() == pytest.approx(d.mean().item())
    assert one["train/opsm_clipfrac"].finish() == pytest.approx(4 / 15)
    assert one["train/mis_catastrophic_seq_fraction"].finish() == pytest.approx(2 / 15)
    assert one["train/mis_catastrophic_token_fraction"].finish() == pytest.approx(1 / 15)
    assert one["train/tis_clipfrac"].finish() == pytest.approx(4 / 15)
