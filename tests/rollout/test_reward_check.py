"""Rewards that could never be won with a chat template are refused before any training."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from miles_lite.config import RewardFunction
from miles_lite.rollout.reward_check import Thinking, preflight
from miles_lite.rollout.reward_worker import load_reward
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.types import Prompt, Verdict

ROOT = Path(__file__).parents[2]

OPENED = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think></think>"
UNSAID = "Put it in <think></think>.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "prompt", "thinking", "needs_thinking"),
    [
        ("deepscaler", OPENED, Thinking.opened, True),
        ("deepscaler", UNSAID, Thinking.unsaid, True),  # worth a warning
        ("math", OPENED, Thinking.opened, False),
        ("math", CLOSED, Thinking.closed, False),
        ("math", UNSAID, Thinking.unsaid, False),
    ],
)
def test_preflight_passes(name: str, prompt: str, thinking: Thinking, needs_thinking: bool) -> None:
    reward = load_reward(ROOT / "rewards" / f"{name}.py", name).call
    check = preflight(reward, prompt, "34")
    assert (check.thinking, check.needs_thinking) == (thinking, needs_thinking)


def test_preflight_refuses_a_reward_behind_thinking_without_thinking() -> None:
    deepscaler = load_reward(ROOT / "rewards" / "deepscaler.py", "deepscaler").call
    with pytest.raises(
        ValueError, match=r"deepscaler can never.*<think></think>.*rewards/math\.py"
    ):
        preflight(deepscaler, CLOSED, "34", name="deepscaler")


def test_preflight_refuses_a_reward_blind_behind_thinking() -> None:
    with pytest.raises(ValueError, match=r"exact can never.*thinking off"):
        preflight(lambda r, label: float(r == label), OPENED, "34", name="exact")


def test_preflight_knows_rewards_that_start_below_zero() -> None:
    preflight(lambda r, label: 1.0 if f"Answer: {label}" in r else -1.0, UNSAID, "34")
    with pytest.raises(ValueError, match="no more than an empty one"):
        preflight(lambda r, label: -1.0, UNSAID, "34")


def test_preflight_tells_why_there_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="no verdict: error: KeyError"):
        preflight(lambda r, label: Verdict(0.0, "error: KeyError"), UNSAID, "34")


def test_preflight_takes_graded_verdicts_of_workers() -> None:
    deepscaler = RewardFunction(file=ROOT / "rewards" / "deepscaler.py", function="deepscaler")
    with RewardWorkers({"": deepscaler}, 1) as workers:

        def grade(response: str, label: str) -> Verdict:
            return asyncio.run(workers.grade(Prompt("", (), OPENED, label, "", {}), response))

        check = preflight(grade, OPENED, "34")
    assert [attempt.response for attempt in check.winners] == ["So that is it.</think>\\boxed{34}"]
