"""Credit: closed formulas by hand, and the names users' dashboards read."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.algo.credit import (
    group_advantages,
    is_repetitive,
    rollout_metrics,
    to_sequences,
)
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def sample(
    reward: float = 0.0,
    *,
    length: int = 2,
    uid: int = 0,
    version: int = 3,
    finish: Finish = Finish.stop,
    reason: str = "",
    text: str = "",
) -> Sample:
    return Sample(
        Prompt(uid=uid, tokens=(1, 2, 3), text="q", label="a"),
        Completion(tuple(range(10, 10 + length)), (-0.5,) * length, version, finish),
        text,
        Verdict(reward, reason),
    )


def group(*rewards: float) -> Group:
    return Group(tuple(sample(reward) for reward in rewards))


def test_advantages_by_hand() -> None:
    assert group_advantages([1, 0, 0, 0], normalize_std=False) == [0.75, -0.25, -0.25, -0.25]
    # the unbiased variance of (1, 0, 0, 0) is (0.5625 + 3 * 0.0625) / 3 = 0.25
    expected = [0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]
    assert group_advantages([1, 0, 0, 0], normalize_std=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("rewards", [[1.0], [0.1, 0.1, 0.1], [0.0] * 7, [-1.0] * 2])
def test_equal_rewards_have_exactly_zero_advantage(
    rewards: list[float], normalize_std: bool
) -> None:
    assert group_advantages(rewards, normalize_std=normalize_std) == [0.0] * len(rewards)


@given(REWARDS, st.booleans())
def test_advantages_are_centred_and_keep_the_order(rewards: list[float], normalize: bool) -> None:
    advantages = group_advantages(rewards, normalize_std=normalize)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    pairs = sorted(zip(rewards, advantages, strict=True))
    assert [a for _, a in pairs] == sorted(advantages)
    if normalize and statistics.stdev(rewards) > 1e-2:
        assert statistics.stdev(advantages) == pytest.approx(1, rel=1e-3)


def test_sequences_keep_every_sample_in_rollout_order() -> None:
    groups = [group(1, 0), group(1, 1), Group((sample(0, length=0), sample(2, length=4)))]
    sequences = to_sequences(groups, normalize_std=False)
    assert [s.sample for s in sequences] == [0, 1, 2, 3, 4, 5]
    assert [s.advantage for s in sequences] == [0.5, -0.5, 0, 0, -1, 1]
    assert [s.response_len for s in sequences] == [2, 2, 2, 2, 0, 4]
    assert sequences[5].tokens == (1, 2, 3, 10, 11, 12, 13)
    assert sequences[5].prompt_len == 3
    assert sequences[5].logprobs == (-0.5,) * 4


def test_an_invalid_verdict_trains_as_reward_zero_and_is_reported() -> None:
    groups = [Group((sample(1), sample(reason="timeout"), sample(reason="crash"), sample(1)))]
    sequences = to_sequences(groups, normalize_std=False)
    assert [s.advantage for s in sequences] == [0.5, -0.5, -0.5, 0.5]
    metrics = rollout_metrics(groups, normalize_std=False)
    assert metrics["reward/invalid_ratio"] == 0.5
    assert metrics["reward/invalid/timeout"] == 0.25
    assert metrics["reward/invalid/crash"] == 0.25
    assert metrics["rollout/raw_reward"] == 0.5


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"sample 1 \(prompt 7\) was aborted"):
        to_sequences([Group((sample(), sample(uid=7, finish=Finish.abort)))], normalize_std=False)
    for broken in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="not all finite"):
            to_sequences([group(1, broken)], normalize_std=True)


def test_rollout_metrics_by_hand() -> None:
    groups = [
        group(0, 0),
        group(1, 1),
        group(1, 1),
        group(0.26, 0.26),
        Group(
            (
                sample(1, length=8, finish=Finish.length, version=2),
                sample(0, length=5, text="the same again, " * 100),
            )
        ),
    ]
    lengths = [2] * 8 + [8, 5]
    assert rollout_metrics(groups, normalize_std=False) == pytest.approx(
        {
            "rollout/raw_reward": 0.552,
            "rollout/rewards": 0.0,
            "rollout/advantages": 0.0,
            "rollout/advantages_std": math.sqrt(2 * 0.25 / 10),
            "rollout/advantages_max": 0.5,
            "rollout/response_len/mean": 2.9,
            "rollout/response_len/median": 2,
            "rollout/response_len/max": 8,
            "rollout/response_len/min": 2,
            "rollout/total_lengths": 3 + sum(lengths) / 10,
            "rollout/truncated_ratio": 0.1,
            "rollout/repetition_frac": 0.1,
            "rollout/zero_std/all_zero_percentage": 0.2,
            "rollout/zero_std/all_one_percentage": 0.4,
            "rollout/zero_std/count_0.0": 1,
            "rollout/zero_std/count_0.3": 1,
            "rollout/zero_std/count_1.0": 2,
            "rollout/weight_version/mean": 2.9,
            "rollout/weight_version/median": 3,
            "rollout/weight_version/max": 3,
            "rollout/weight_version/min": 2,
            "rollout/weight_version/mixed_version_ratio": 0.2,
            "reward/invalid_ratio": 0.0,
        }
    )


def test_repetition_tells_a_loop_from_a_derivation() -> None:
    derivation = "".join(
        f"Step {i}: {i} squared is {i * i}, so the sum is {i * i + 7}. " for i in range(90)
    )
    assert not is_repetitive(derivation)
    assert is_repetitive(derivation + "wait, let me check that. " * 400)
    assert not is_repetitive("0" * 500)
    assert not is_repetitive("")
    is_repetitive("\ud800" * 2_000)  # half a surrogate pair, as a cut decoder leaves it
