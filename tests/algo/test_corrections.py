"""Importance correction: by hand, by closed formula, and through the loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from miles_lite.algo.corrections import correct
from miles_lite.algo.losses import LogProbs, LossSettings, policy_loss
from miles_lite.config import CorrectionConfig
from miles_lite.metrics import finish

Level = Literal["token", "sequence", "geometric"]

TIS = CorrectionConfig(weight="token")
ICEPOP = CorrectionConfig(weight="token", low=0.5, high=2.0, outside="mask")
VETO = CorrectionConfig(veto=1e-2)
ALL = [
    TIS,
    ICEPOP,
    VETO,
    CorrectionConfig(weight="sequence"),
    CorrectionConfig(weight="geometric", outside="mask"),
    CorrectionConfig(reject="token"),
    CorrectionConfig(reject="sequence"),
    CorrectionConfig(weight="token", reject="geometric", veto=1e-4),
]

LENGTHS = (2, 0, 3, 1)
RATIOS = torch.tensor([1.5, 0.5, 4.0, 0.125, 1.0, 3.0], dtype=torch.float64)  # trainer / engine
ROLLOUT = torch.tensor([-1.0, -0.5, -3.0, -0.2, -2.0, -1.5], dtype=torch.float64)
OLD = ROLLOUT + RATIOS.log()
PRODUCTS, MEANS = [0.75, 0.5, 3.0], [0.75**0.5, 0.5 ** (1 / 3), 3.0]  # of each sequence


def spread(values: list[float]) -> list[float]:
    """One value a sequence that has tokens, to one a token."""
    lengths = [n for n in LENGTHS if n]
    return [value for value, n in zip(values, lengths, strict=True) for _ in range(n)]


def factor_of(settings: CorrectionConfig) -> list[float]:
    return correct(OLD, ROLLOUT, LENGTHS, settings)[0].tolist()


@pytest.mark.parametrize(
    ("level", "ratios"),
    [
        ("token", RATIOS.tolist()),
        ("sequence", spread(PRODUCTS)),
        ("geometric", spread(MEANS)),
    ],
)
def test_levels_and_ranges_by_hand(level: Level, ratios: list[float]) -> None:
    clip = CorrectionConfig(weight=level, low=0.7, high=2.0)
    assert factor_of(clip) == pytest.approx([min(max(r, 0.7), 2.0) for r in ratios])
    mask = dataclasses.replace(clip, outside="mask")
    assert factor_of(mask) == pytest.approx([r if 0.7 <= r <= 2 else 0 for r in ratios])
    reject = CorrectionConfig(reject=level, reject_low=0.7, reject_high=2.0)
    assert factor_of(reject) == [float(0.7 <= r <= 2) for r in ratios]


def test_weight_rejection_and_veto_multiply() -> None:
    settings = CorrectionConfig(weight="token", reject="sequence", reject_high=4.0, veto=0.2)
    assert factor_of(settings) == pytest.approx([1.5, 0.5, 0, 0, 0, 2.0])


def test_a_bound_itself_is_inside() -> None:
    old, rollout = torch.tensor([0.0, -1.0]), torch.tensor([0.0, -1.0])
    for settings in (
        CorrectionConfig(weight="token", low=1.0, high=1.0, outside="mask"),
        CorrectionConfig(reject="token", reject_low=1.0, reject_high=1.0),
    ):
        assert correct(old, rollout, (2,), settings)[0].tolist() == [1, 1]


def test_veto_kills_the_planted_sequence_alone() -> None:
    """One hopeless token is enough, however likely the others; its ratio is not bounded first."""
    old = torch.full((9,), -1.0)
    rollout = old.clone()
    rollout[4] += 5.0  # ratio 0.007
    rollout[3] -= 9.0
    factor, told = correct(old, rollout, (3, 3, 3), VETO)
    assert factor.tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert told["train/mis_catastrophic_seq_fraction"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert told["train/mis_catastrophic_token_fraction"].nonzero().tolist() == [[4]]
    tiny = CorrectionConfig(veto=1e-12)  # e^-20 = 2e-9 is the bound of all other ratios
    assert correct(old, rollout, (3, 3, 3), tiny)[0].tolist() == [1] * 9
    rollout[4] += 25.0
    assert correct(old, rollout, (3, 3, 3), tiny)[0].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_the_exponent_is_bounded() -> None:
    """A product over a long answer overflows long before its tokens look odd."""
    old, rollout = torch.full((2000,), -1.0), torch.full((2000,), -1.1)
    settings = CorrectionConfig(weight="sequence", high=math.inf)
    assert correct(old, rollout, (2000,), settings)[0].max() == pytest.approx(math.exp(20))
    assert correct(rollout, old, (2000,), settings)[0].min() == pytest.approx(math.exp(-20))


def test_what_is_told() -> None:
    settings = CorrectionConfig(weight="token", low=0.3, reject="sequence", reject_low=0.6)
    _, told = correct(OLD, ROLLOUT, LENGTHS, settings)
    values = {name: tensor.double().tolist() for name, tensor in told.items()}
    assert values == {
        "train/tis": pytest.approx(RATIOS.tolist()),
        "train/tis_clipfrac": [0, 0, 1, 1, 0, 1],
        "train/tis_abs": pytest.approx([0.5, 0.5, 3, 0.875, 0, 2]),
        "train/mis_mask_fraction_low": [0, 0, 1, 1, 1, 0],
        "train/mis_mask_fraction_high": [0, 0, 0, 0, 0, 1],
    }
    assert correct(OLD, ROLLOUT, LENGTHS, CorrectionConfig())[1] == {}


# ------------------------------------------------------------------ through the loss


def random_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(old, current with gradient, advantages, weights) of 9 tokens"""
    rng = torch.Generator().manual_seed(4)
    old, moved, adv = torch.randn(3, 9, generator=rng, dtype=torch.float64)
    weights = torch.rand(9, generator=rng, dtype=torch.float64)
    return old, (old + 0.05 * moved).requires_grad_(), adv, weights


@pytest.mark.parametrize("settings", ALL)
def test_equal_policies_need_no_correction(settings: CorrectionConfig) -> None:
    old, cur, adv, weights = random_tokens()
    logprobs = LogProbs(cur, old, old.clone())
    gradients = []
    for s in (LossSettings(), LossSettings(correction=settings)):
        loss, partials = policy_loss(logprobs, adv, weights, (5, 4), s)
        gradients.append(*torch.autograd.grad(loss, cur))
    torch.testing.assert_close(gradients[0], gradients[1])
    metrics = finish(partials)
    assert metrics.get("train/tis", 1) == pytest.approx(1)
    told = [name for name in metrics if "/mis_" in name or "/tis_" in name]
    assert told
    assert not any(metrics[name] for name in told)


@pytest.mark.parametrize(("settings", "dead"), [(ICEPOP, [4]), (VETO, [3, 4, 5])])
def test_an_outlier_loses_its_policy_gradient_and_nothing_else(
    settings: CorrectionConfig, dead: list[int]
) -> None:
    """The KL and entropy of those tokens stay, and so does what all others weigh."""
    old, cur, adv, weights = random_tokens()
    ref, entropy = cur.detach() + 1, torch.rand(9, dtype=torch.float64).requires_grad_()
    rollout = old.clone()
    rollout[4] += 5  # trainer / engine = 0.007
    terms = LossSettings(kl_loss_coef=0.1, entropy_coef=0.1)

    def gradients(adv: Tensor, s: LossSettings) -> tuple[Tensor, ...]:
        loss, _ = policy_loss(LogProbs(cur, old, rollout, ref, entropy), adv, weights, (3, 3, 3), s)
        return torch.autograd.grad(loss, (cur, entropy))

    corrected = gradients(adv, dataclasses.replace(terms, correction=settings))
    whole, without_pg = gradients(adv, terms), gradients(0 * adv, terms)
    expected = whole[0].clone()
    expected[dead] = without_pg[0][dead]
    torch.testing.assert_close(corrected, (expected, whole[1]))
    assert (whole[0] != without_pg[0]).all()


def test_the_factor_carries_no_gradient() -> None:
    """Also where the policy in training is its own old one."""
    old, cur, adv, weights = random_tokens()
    rollout = old - 0.3
    s = LossSettings(correction=TIS)
    loss, _ = policy_loss(LogProbs(cur, cur, rollout), adv, weights, (9,), s)
    assert not correct(cur, rollout, (9,), TIS)[0].requires_grad
    assert loss.item() == pytest.approx(-(weights * adv * (cur - rollout).exp()).sum().item())


def test_the_engine_is_not_corrected_for_itself() -> None:
    old, cur, adv, weights = random_tokens()
    with pytest.raises(AssertionError, match="nothing to correct"):
        policy_loss(LogProbs(cur, old, old), adv, weights, (9,), LossSettings(correction=TIS))
