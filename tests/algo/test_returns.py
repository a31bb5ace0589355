"""Advantages of tokens: KL in the return, and whitening, against the formulas written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.algo.returns import moments, token_advantages, whiten

LENGTHS = [3, 1, 2]
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
KL = torch.tensor([0.1, 0.2, 0.4, 1.0, 0.5, 0.25], dtype=torch.float64)


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype))


def test_the_return_of_reinforce_plus_plus_pays_for_the_kl_still_to_come() -> None:
    returns = token_advantages(
        ADVANTAGES, KL, LENGTHS, estimator="reinforce_plus_plus", kl_coef=0.1
    )
    close(returns, [1 - 0.07, 1 - 0.06, 1 - 0.04, -2 - 0.1, 0.5 - 0.075, 0.5 - 0.025])


def test_with_a_baseline_each_token_pays_for_its_own_kl() -> None:
    returns = token_advantages(
        ADVANTAGES, KL, LENGTHS, estimator="reinforce_plus_plus_baseline", kl_coef=0.1
    )
    close(returns, [0.99, 0.98, 0.96, -2.1, 0.45, 0.475])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_samples_compared_as_a_whole_pay_nothing_twice(estimator: str) -> None:
    returns = token_advantages(ADVANTAGES, KL, LENGTHS, estimator=estimator, kl_coef=0.1)  # pyright: ignore[reportArgumentType]
    close(returns, [1, 1, 1, -2, 0.5, 0.5])


def test_an_answer_without_tokens_has_no_advantage_of_tokens() -> None:
    returns = token_advantages(
        torch.tensor([1.0, 2.0]),
        torch.tensor([0.5]),
        [0, 1],
        estimator="reinforce_plus_plus",
        kl_coef=1.0,
    )
    close(returns, [1.5])


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=40),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_whitening_does_not_depend_on_how_ranks_share_the_tokens(values, ranks, random) -> None:
    counts = [random.random() < 0.8 for _ in values]
    owner = [random.randrange(ranks) for _ in values]
    whole, used = torch.tensor(values, dtype=torch.float64), torch.tensor(counts)
    shares = [torch.tensor([o == rank for o in owner]) for rank in range(ranks)]
    total = torch.stack([moments(whole[share], used[share]) for share in shares]).sum(0)
    torch.testing.assert_close(total, moments(whole, used))
    if used.sum() >= 2 and whole[used].std() > 1e-3:
        expected = (whole - whole[used].mean()) / (whole[used].var() + 1e-8).sqrt()
        torch.testing.assert_close(whiten(whole, total), expected, atol=1e-7, rtol=1e-7)


def test_a_rank_without_tokens_still_has_moments_to_send() -> None:
    nothing = moments(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert nothing.tolist() == [0, 0, 0]
    assert whiten(torch.zeros(0), nothing).shape == (0,)


def test_one_token_or_equal_tokens_whiten_to_zero_and_not_to_nan() -> None:
    for values in ([3.0], [3.0, 3.0, 3.0]):
        x = torch.tensor(values)
        total = moments(x, torch.ones(len(values), dtype=torch.bool))
        assert whiten(x, total).abs().max() == 0
