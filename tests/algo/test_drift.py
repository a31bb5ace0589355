"""Drift: known answers, and no way to compare a thing with itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.algo.drift import ess_ratios, rollout_drift, update_drift
from miles_lite.metrics import finish, merge

TRAINER = torch.tensor([-1.0, -2.0, -0.5, -3.0])
ROLLOUT = torch.tensor([-1.5, -2.0, -0.25, -1.0])
LENGTHS = (1, 0, 3)


def k3(trainer: float, rollout: float) -> float:
    """Estimate of KL(rollout || trainer) from a token drawn by the engine."""
    ratio = math.exp(trainer - rollout)
    return ratio - 1 - math.log(ratio)


def test_drift_by_hand() -> None:
    kls = [k3(a, b) for a, b in zip(TRAINER.tolist(), ROLLOUT.tolist(), strict=True)]
    metrics = finish(rollout_drift(TRAINER, ROLLOUT, LENGTHS))
    assert metrics == pytest.approx(
        {
            "train/train_rollout_logprob_abs_diff": (0.5 + (0 + 0.25 + 2.0) / 3) / 2,
            "train/train_rollout_logprob_abs_diff_max": 2.0,
            "train/train_rollout_kl": (kls[0] + sum(kls[1:]) / 3) / 2,
            "train/nonfinite_logprobs": 0,
        }
    )


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(-2, 2)), min_size=1, max_size=6))
def test_a_planted_difference_is_found(planted: list[tuple[int, float]]) -> None:
    """Every token of a sample off by the same: each sample counts once, long or short."""
    lengths, shifts = zip(*planted, strict=True)
    rollout = -torch.rand(sum(lengths), dtype=torch.float64)
    off = torch.tensor(shifts, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    metrics = finish(rollout_drift(rollout + off, rollout, lengths))
    assert metrics == pytest.approx(
        {
            "train/train_rollout_logprob_abs_diff": sum(map(abs, shifts)) / len(shifts),
            "train/train_rollout_logprob_abs_diff_max": max(map(abs, shifts)),
            "train/train_rollout_kl": sum(k3(x, 0) for x in shifts) / len(shifts),
            "train/nonfinite_logprobs": 0,
        },
        abs=1e-12,
    )


def test_the_kl_is_of_the_engine_to_the_trainer_and_clamped() -> None:
    """Where the engine expects a token far more than the trainer, its k3 is about x, not e^x."""
    sure, doubtful = torch.tensor([-0.1]), torch.tensor([-5.1])
    small = finish(rollout_drift(trainer=doubtful, rollout=sure, lengths=[1]))
    large = finish(rollout_drift(trainer=sure, rollout=doubtful, lengths=[1]))
    assert small["train/train_rollout_kl"] == pytest.approx(math.exp(-5) - 1 + 5, rel=1e-5)
    assert large["train/train_rollout_kl"] == 10  # e^5 - 6, bounded


def test_drift_does_not_depend_on_the_split() -> None:
    parts = [
        rollout_drift(TRAINER[part].clone(), ROLLOUT[part].clone(), lengths)
        for part, lengths in (
            (slice(0, 1), [1]),
            (slice(1, 1), [0]),
            (slice(1, 1), []),  # a micro-batch without any sample that is trained on
            (slice(1, 4), [3]),
        )
    ]
    whole = finish(rollout_drift(TRAINER, ROLLOUT, LENGTHS))
    assert finish(merge(*parts)) == pytest.approx(whole)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_logprobs_are_left_out_and_counted(broken: float) -> None:
    trainer, rollout = TRAINER.clone(), ROLLOUT.clone()
    trainer[3], rollout[1] = broken, broken
    metrics = finish(rollout_drift(trainer, rollout, LENGTHS))
    assert metrics["train/nonfinite_logprobs"] == 2
    kept = [0, 2]
    expected = finish(rollout_drift(TRAINER[kept], ROLLOUT[kept], [1, 1]))
    assert metrics == pytest.approx(expected | {"train/nonfinite_logprobs": 2})


def test_nothing_but_broken_logprobs_has_no_mean() -> None:
    metrics = finish(rollout_drift(torch.full((4,), torch.nan), ROLLOUT, LENGTHS))
    assert metrics["train/nonfinite_logprobs"] == 4
    assert all(math.isnan(v) for name, v in metrics.items() if "nonfinite" not in name)


def test_no_samples_at_all_have_no_mean_either() -> None:
    """All that a rank computes may be sequences that only keep it in step with the others."""
    nothing = rollout_drift(torch.empty(0), torch.empty(0), [])
    assert all(math.isnan(v) for name, v in finish(nothing).items() if "nonfinite" not in name)
    whole = rollout_drift(TRAINER, ROLLOUT, LENGTHS)
    assert finish(merge(whole, nothing)) == finish(whole)
    assert math.isnan(finish(update_drift(torch.empty(0), torch.empty(0), []))["train/ess_ratio"])


def test_a_tensor_is_not_compared_with_itself() -> None:
    for other in (TRAINER, TRAINER.detach(), TRAINER.view(2, 2).view(4)):
        with pytest.raises(AssertionError, match="to itself"):
            rollout_drift(TRAINER, other, LENGTHS)
    with pytest.raises(AssertionError, match="to itself"):
        update_drift(TRAINER, TRAINER, [4])


def test_ess_by_hand() -> None:
    log_weights = torch.tensor([1.0, 3.0, 7.0, 7.0, 7.0, 5.0], dtype=torch.float64).log()
    # (1 + 3)^2 / (2 * 10), equal weights, one token
    assert ess_ratios(log_weights, [2, 3, 1]).tolist() == pytest.approx([0.8, 1, 1])
    assert ess_ratios(log_weights + 300, [2, 3, 1]).tolist() == pytest.approx([0.8, 1, 1])
    one_of_four = torch.tensor([800.0, 0.0, 0.0, 0.0])  # e^800 overflows
    assert ess_ratios(one_of_four, [4]).tolist() == pytest.approx([0.25])


def test_update_drift_averages_over_samples_with_a_response() -> None:
    old = torch.zeros(5)
    current = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0]).log()
    metrics = finish(update_drift(current, old, [2, 0, 3]))
    assert metrics == pytest.approx({"train/ess_ratio": 0.9})
    parts = merge(
        update_drift(current[:2], old[:2], [2, 0]),
        update_drift(current[2:], old[2:], [3]),
        update_drift(current[:0], old[:0], []),
    )
    assert finish(parts) == pytest.approx({"train/ess_ratio": 0.9})
    current[0] = torch.nan
    assert math.isnan(finish(update_drift(current, old, [2, 0, 3]))["train/ess_ratio"])
