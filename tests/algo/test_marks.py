"""Of each reward, what an answer must have to score, and how many answers have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from miles_lite.algo.marks import wanted_marks, wanted_shares
from miles_lite.config import RewardConfig, RewardFunction
from miles_lite.types import Completion, Finish, Prompt, Sample, Verdict

REWARDS = Path(__file__).resolve().parents[2] / "rewards"


def answer(text: str, reward: str = "") -> Sample:
    prompt = Prompt("set:0", (1,), "q", "34", reward, {})
    return Sample(prompt, Completion((5,), (-1.0,), 0, Finish.stop), text, Verdict(0.0, ""))


def config(function: str, **options: object) -> RewardConfig:
    return RewardConfig(file=REWARDS / f"{function}.py", function=function, options=options)


@pytest.mark.parametrize(
    ("reward", "having", "lacking"),
    [
        (config("math"), r"\boxed{34}", "34"),
        (config("deepscaler"), r"so</think> \boxed{34}", r"so \boxed{34}"),
        (config("deepscaler"), r"so ###Response \boxed{34}", "so</think> 34"),
        (config("exact", marker="####"), "#### 34", "34"),
        (config("exact", marker="A+ "), "A+ 34", "AA 34"),  # no pattern of the user's
        (config("dapo_math"), "answer : 34", r"\boxed{34}"),
        (config("dapo_math", strict=True), r"\boxed{34}", "Answer: 34"),
    ],
)
def test_a_share_counts_what_the_reward_cannot_do_without(
    reward: RewardConfig, having: str, lacking: str
) -> None:
    answers = [answer(having), answer(lacking), answer(lacking)]
    assert wanted_shares(answers, wanted_marks(reward)) == {"own": 1 / 3}


def test_rewards_that_look_for_nothing_have_no_share() -> None:
    for reward in (config("exact"), config("letters"), config("math_verify")):
        assert wanted_marks(reward) == {}


def test_each_reward_counts_its_own_answers() -> None:
    service = RewardFunction(
        file=REWARDS / "exact.py", function="exact", options={"marker": "####"}
    )
    marks = wanted_marks(replace(config("math"), others={"service": service, "free": service}))
    answers = [answer("#### 3", "service"), answer("3", "service"), answer("#### 3")]
    assert wanted_shares(answers, marks) == {"own": 0.0, "service": 0.5}  # of "free" no answer
