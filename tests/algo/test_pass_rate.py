"""pass@k against counting, intervals against what they promise."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from miles_lite.algo.pass_rate import ks, mean, pass_at_k, rate


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_counts_the_draws_with_a_right_one(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        samples = [True] * num_right + [False] * (num_samples - num_right)
        for k in range(1, num_samples + 1):
            draws = list(itertools.combinations(samples, k))
            by_hand = sum(map(any, draws)) / len(draws)
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(by_hand, abs=1e-12)
    with pytest.raises(ValueError, match=f"pass@{num_samples + 1}"):
        pass_at_k(num_samples, 0, num_samples + 1)


def test_which_k() -> None:
    assert [list(ks(n)) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def prompts(num: int, samples: int, rng: random.Random, a: float, b: float) -> list[int]:
    """Right samples of each prompt; how hard a prompt is comes from Beta(a, b)."""
    hard = [rng.betavariate(a, b) for _ in range(num)]
    return [sum(rng.random() < p for _ in range(samples)) for p in hard]


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.5, 2.0), (8.0, 0.5)])
@pytest.mark.parametrize("k", [1, 4])
def test_intervals_hold_the_truth_as_often_as_they_promise(a: float, b: float, k: int) -> None:
    """1 - E[(1-p)^k] is known: p is Beta, and its moments are rational."""
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
    rng, held, held_mean, values = random.Random(7), 0, 0, []
    for _ in range(1000):
        counts = prompts(40, 8, rng, a, b)
        passed = [pass_at_k(8, c, k) for c in counts]
        found, plain = rate(passed), mean(passed)
        assert 0 <= found.low <= found.value <= found.high <= 1
        held += found.low <= truth <= found.high
        held_mean += plain.low <= truth <= plain.high
        values.append(found.value)
    assert statistics.fmean(values) == pytest.approx(truth, abs=0.01)  # unbiased
    assert 0.93 <= held / 1000 <= 0.985
    if b >= 1:
        assert 0.92 <= held_mean / 1000 <= 0.97
    else:  # why it is Wilson's: where most prompts are always right, the plain one is too short
        assert held_mean < held


def test_an_interval_is_of_prompts_and_not_of_samples() -> None:
    """Samples that all agree within a prompt tell no more than one of them."""
    rng = random.Random(0)
    ones = [float(rng.random() < 0.3) for _ in range(100)]
    width = rate(ones).high - rate(ones).low
    assert 0.15 < width < 0.21  # 2 x 1.96 x sqrt(0.3 x 0.7 / 100) = 0.18


def test_ends_are_not_certain() -> None:
    assert rate([1.0] * 20).low == pytest.approx(0.82, abs=0.03) and rate([1.0] * 20).high == 1
    assert rate([0.0] * 20).high == pytest.approx(0.18, abs=0.03)
    assert rate([0.5] * 20).low < 0.45
    assert rate([1.0]).low < 0.3
    assert mean([2.0]).low == -math.inf
    few = [1.0, -1.0, 1.0]
    assert mean(few).high == pytest.approx(1 / 3 + 4.303 * statistics.stdev(few) / 3**0.5, rel=0.07)
