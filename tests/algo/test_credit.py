"""Credit: closed formulas by hand, and the names users' dashboards read."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.algo.credit import (
    CreditSettings,
    Estimator,
    advantages,
    dead_step_reason,
    is_repetitive,
    overlong_penalty,
    rollout_metrics,
    to_sequences,
)
from miles_lite.protocols import Metrics
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)
DR_GRPO = CreditSettings(
    estimator="grpo",
    normalize_std=False,
    drop_invalid=True,
    max_response_len=10,
    overlong_buffer=0,
    overlong_penalty=1.0,
    overlong_filter=False,
)


def sample(
    reward: float = 0.0,
    *,
    length: int = 2,
    uid: str = "tiny:0",
    version: int = 3,
    finish: Finish = Finish.stop,
    reason: str = "",
    text: str = "",
) -> Sample:
    return Sample(
        Prompt(uid, tokens=(1, 2, 3), text="q", label="a", reward="", metadata={}),
        Completion(tuple(range(10, 10 + length)), (-0.5,) * length, version, finish),
        text,
        Verdict(reward, reason),
    )


def group(*rewards: float) -> Group:
    return Group(tuple(sample(reward) for reward in rewards))


def of_one_group(rewards: list[float], estimator: Estimator, normalize: bool) -> list[float]:
    return advantages(rewards, [0] * len(rewards), estimator=estimator, normalize_std=normalize)


def test_advantages_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]
    centred = [0.75, -0.25, -0.25, -0.25]
    assert of_one_group(rewards, "grpo", False) == centred
    # the unbiased variance of (1, 0, 0, 0) is (0.5625 + 3 * 0.0625) / 3 = 0.25
    normalised = [value / 0.500001 for value in centred]
    assert of_one_group(rewards, "grpo", True) == pytest.approx(normalised, rel=1e-12)
    left_out = [1.0, -1 / 3, -1 / 3, -1 / 3]  # the others' means are 0 and 1/3
    assert of_one_group(rewards, "rloo", True) == pytest.approx(left_out, rel=1e-12)
    assert of_one_group(rewards, "reinforce_plus_plus", True) == rewards
    assert of_one_group(rewards, "reinforce_plus_plus_baseline", True) == centred


@given(REWARDS)
def test_rloo_compares_each_sample_with_the_mean_of_the_others(rewards: list[float]) -> None:
    expected = [
        reward - statistics.fmean(rewards[:i] + rewards[i + 1 :])
        for i, reward in enumerate(rewards)
    ]
    assert of_one_group(rewards, "rloo", False) == pytest.approx(expected, abs=1e-9)


def test_a_group_is_compared_within_itself_wherever_its_samples_stand() -> None:
    values = advantages([1.0, 5.0, 0.0, 7.0], [0, 1, 0, 1], estimator="grpo", normalize_std=False)
    assert values == [0.5, -1.0, -0.5, 1.0]


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("rewards", [[1.0], [0.1, 0.1, 0.1], [0.0] * 7, [-1.0] * 2])
def test_equal_rewards_have_exactly_zero_advantage(
    rewards: list[float], normalize_std: bool, estimator: Estimator
) -> None:
    assert of_one_group(rewards, estimator, normalize_std) == [0.0] * len(rewards)


@given(REWARDS, st.booleans())
def test_advantages_are_centred_and_keep_the_order(rewards: list[float], normalize: bool) -> None:
    values = of_one_group(rewards, "grpo", normalize)
    assert sum(values) == pytest.approx(0, abs=1e-6)
    pairs = sorted(zip(rewards, values, strict=True))
    assert [a for _, a in pairs] == sorted(values)
    if normalize and statistics.stdev(rewards) > 1e-2:
        assert statistics.stdev(values) == pytest.approx(1, rel=1e-3)


def test_sequences_keep_every_sample_in_rollout_order() -> None:
    groups = [group(1, 0), group(1, 1), Group((sample(0, length=0), sample(2, length=4)))]
    sequences = to_sequences(groups, DR_GRPO)
    assert [s.sample for s in sequences] == [0, 1, 2, 3, 4, 5]
    assert [s.group for s in sequences] == [0, 0, 1, 1, 2, 2]
    assert [s.reward for s in sequences] == [1, 0, 1, 1, 0, 2]
    assert [s.advantage for s in sequences] == [0.5, -0.5, 0, 0, -1, 1]
    assert [s.response_len for s in sequences] == [2, 2, 2, 2, 0, 4]
    assert all(s.counts for s in sequences)
    assert sequences[5].tokens == (1, 2, 3, 10, 11, 12, 13)
    assert sequences[5].prompt_len == 3
    assert sequences[5].logprobs == (-0.5,) * 4


def test_what_has_no_verdict_is_left_out_or_counts_as_wrong_as_the_run_says() -> None:
    groups = [Group((sample(1), sample(reason="timeout"), sample(reason="crash"), sample(0)))]
    dropped = to_sequences(groups, DR_GRPO)
    assert [s.counts for s in dropped] == [True, False, False, True]
    assert [s.advantage for s in dropped] == [0.5, 0, 0, -0.5]  # the baseline is of the two
    wrong = to_sequences(groups, replace(DR_GRPO, drop_invalid=False))
    assert all(s.counts for s in wrong)
    assert [s.advantage for s in wrong] == [0.75, -0.25, -0.25, -0.25]
    metrics = rollout_metrics(groups, dropped, DR_GRPO)
    assert metrics["reward/invalid_ratio"] == 0.5
    assert metrics["reward/invalid/timeout"] == 0.25
    assert metrics["reward/invalid/crash"] == 0.25
    assert metrics["rollout/raw_reward"] == 0.5
    assert metrics["rollout/not_counted_ratio"] == 0.5


def test_a_step_without_any_verdict_reports_no_reward_rather_than_zero() -> None:
    groups = [Group((sample(reason="crash"), sample(reason="crash")))]
    sequences = to_sequences(groups, DR_GRPO)
    metrics = rollout_metrics(groups, sequences, DR_GRPO)
    assert "rollout/raw_reward" not in metrics
    assert "rollout/rewards" not in metrics
    assert metrics["rollout/taught_ratio"] == 0
    assert "2 of 2 answers without verdict (crash)" in dead_step_reason(groups)


def test_the_overlong_penalty_is_linear_over_the_buffer() -> None:
    settings = replace(DR_GRPO, overlong_buffer=4, overlong_penalty=2.0)  # of 10 tokens
    paid = [overlong_penalty(n, settings) for n in range(11)]
    assert paid == [0] * 7 + [0.5, 1.0, 1.5, 2.0]
    assert overlong_penalty(10, DR_GRPO) == 0


def test_the_overlong_penalty_enters_the_advantage_but_not_the_raw_reward() -> None:
    settings = replace(DR_GRPO, overlong_buffer=4)
    groups = [Group((sample(1, length=10, finish=Finish.length), sample(1, length=2)))]
    sequences = to_sequences(groups, settings)
    assert [s.reward for s in sequences] == [0.0, 1.0]
    assert [s.advantage for s in sequences] == [-0.5, 0.5]
    metrics = rollout_metrics(groups, sequences, settings)
    assert metrics["rollout/raw_reward"] == 1.0
    assert metrics["rollout/taught_ratio"] == metrics["rollout/zero_advantage_ratio"] == 0.0


def test_a_filtered_overlong_answer_has_no_loss_but_stays_in_the_baseline() -> None:
    settings = replace(DR_GRPO, overlong_filter=True)
    groups = [Group((sample(0, length=10, finish=Finish.length), sample(1), sample(0.5)))]
    sequences = to_sequences(groups, settings)
    assert [s.counts for s in sequences] == [False, True, True]
    assert [s.advantage for s in sequences] == [0, 0.5, 0]


def test_what_cannot_be_trained_on_is_refused() -> None:
    aborted = Group((sample(), sample(uid="tiny:7", finish=Finish.abort)))
    with pytest.raises(AssertionError, match=r"sample 1 \(prompt tiny:7\) was aborted"):
        to_sequences([aborted], DR_GRPO)
    for broken in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="not all finite"):
            to_sequences([group(1, broken)], DR_GRPO)


def test_rollout_metrics_by_hand() -> None:
    groups = [
        group(0, 0),
        group(1, 1),
        group(1, 1),
        group(0.26, 0.26),
        Group(
            (
                sample(1, length=8, finish=Finish.length, version=2, text="is \\boxed{3}"),
                sample(0, length=5, text="</think>" + "the same again, " * 100),
            )
        ),
    ]
    lengths = [2] * 8 + [8, 5]
    expected: Metrics = {
        "rollout/raw_reward": 0.552,
        "rollout/rewards": 0.0,
        "rollout/advantages_std": math.sqrt(2 * 0.25 / 10),
        "rollout/advantages_max": 0.5,
        "rollout/response_len/mean": 2.9,
        "rollout/response_len/median": 2,
        "rollout/response_len/max": 8,
        "rollout/response_len/min": 2,
        "rollout/total_lengths": 3 + sum(lengths) / 10,
        "rollout/truncated_ratio": 0.1,
        "rollout/repetition_frac": 0.1,
        "rollout/not_counted_ratio": 0.0,
        "rollout/zero_advantage_ratio": 0.8,
        "rollout/taught_ratio": 0.2,
        "rollout/marker/think_end": 0.1,
        "rollout/marker/boxed": 0.1,
        "rollout/marker/answer": 0.0,
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
    found = rollout_metrics(groups, to_sequences(groups, DR_GRPO), DR_GRPO)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimator", "groups", "taught"),
    [
        ("grpo", [group(0, 0), group(0, 1)], 0.5),
        ("grpo", [group(0, 0), group(1, 1)], 0.0),
        ("rloo", [group(0, 0.5, 1)], 2 / 3),  # the middle one has no advantage
        ("reinforce_plus_plus", [group(0, 0), group(1, 1)], 1.0),  # compared with the batch
        ("reinforce_plus_plus", [group(1, 1), group(1, 1)], 0.0),
        ("reinforce_plus_plus_baseline", [group(1, 1), group(0, 0)], 0.0),
    ],
)
def test_an_answer_teaches_if_its_reward_is_not_that_of_all_it_is_compared_with(
    estimator: Estimator, groups: list[Group], taught: float
) -> None:
    settings = replace(DR_GRPO, estimator=estimator)
    found = rollout_metrics(groups, to_sequences(groups, settings), settings)
    assert found["rollout/taught_ratio"] == pytest.approx(taught)


def test_a_dead_step_is_described() -> None:
    reason = dead_step_reason([group(0, 0), group(1, 1)])
    assert "rewards between 0 and 1, equal in each group" in reason
    assert "0% with boxed" in reason


def test_repetition_tells_a_loop_from_a_derivation() -> None:
    derivation = "".join(
        f"Step {i}: {i} squared is {i * i}, so the sum is {i * i + 7}. " for i in range(90)
    )
    assert not is_repetitive(derivation)
    assert is_repetitive(derivation + "wait, let me check that. " * 400)
    assert not is_repetitive("0" * 500)
    assert not is_repetitive("")
    is_repetitive("\ud800" * 2_000)  # half a surrogate pair, as a cut decoder leaves it
