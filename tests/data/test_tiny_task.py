"""The task of the tiny model: demonstrations fail in as many ways as its docstring says."""

from __future__ import annotations

import random

import pytest

from rewards.deepscaler import deepscaler
from tools.tiny_task import Sum, all_sums, build_tokenizer, demonstrate, score

TASK = Sum(17, 58)


def test_clean_demonstration() -> None:
    response = demonstrate(TASK, spoiled=0.0, rng=random.Random(0))
    assert response == r"17+58=75</think>\boxed{75}<|im_end|>"
    assert score(response, "75") == 1.0


def test_spoiled_demonstrations_earn_nothing_in_several_ways() -> None:
    rng = random.Random(0)
    responses = {demonstrate(TASK, spoiled=1.0, rng=rng) for _ in range(300)}
    assert not any(score(response, "75") for response in responses)
    assert any("</think>" not in response for response in responses)
    assert any("\\boxed{" not in response for response in responses)
    assert any(not response.endswith("<|im_end|>") for response in responses)
    assert any(response.startswith("17+58=75</think>\\boxed{") for response in responses)
    longest = max(len(build_tokenizer().encode(response)) for response in responses)
    assert longest <= 24


@pytest.mark.parametrize(
    "response",
    [
        r"75</think>\boxed{75}<|im_end|>",
        r"75</think>\boxed{57}\boxed{75}",
        r"\boxed{75}</think>\boxed{76}",
        r"75\boxed{75}<|im_end|>",
        r"75</think>75",
        r"75</think>\boxed{75<|im_end|>",
        r"</think></think>\boxed{75}",
        "",
    ],
)
def test_score_agrees_with_the_reward_of_the_project(response: str) -> None:
    assert score(response, "75") == deepscaler(response, "75")


def test_sums_are_all_there_once_and_in_seeded_order() -> None:
    assert len(set(all_sums(0))) == 10_000
    assert all_sums(0) == all_sums(0) != all_sums(1)
