"""Requests are spread evenly, and a prompt is read by as few as that allows."""

from __future__ import annotations

import random

import pytest

from miles_lite.rollout.deal import deal


def prompts(num: int, samples: int) -> list[tuple[int, ...]]:
    return [(prompt,) for prompt in range(num) for _ in range(samples)]


@pytest.mark.parametrize("takers", [1, 2, 4, 16, 128])
@pytest.mark.parametrize(("num", "samples"), [(1, 1), (2, 8), (5, 4), (9, 8), (24, 8), (512, 8)])
def test_loads_are_even_and_few_prompts_are_read_twice(takers: int, num: int, samples: int) -> None:
    asked = prompts(num, samples)
    dealt = deal(asked, [1] * len(asked), [0] * takers)
    loads = [dealt.count(taker) for taker in range(takers)]
    assert max(loads) - min(loads) <= max(1, samples // 2) and max(loads) == -(
        -len(asked) // takers
    )
    reads = len({*zip(asked, dealt, strict=True)})
    assert reads <= num + takers


def test_samples_of_a_prompt_stay_together_where_that_is_even() -> None:
    asked = prompts(4, 8)
    assert deal(asked, [1] * 32, [0, 0]) == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert deal([(7,)] * 32, [1] * 32, [0, 0]) == [0] * 16 + [1] * 16


def test_who_has_much_to_do_gets_less() -> None:
    assert deal(prompts(3, 2), [5] * 6, [30, 0, 10]) == [1, 1, 1, 1, 2, 2]


def test_costs_of_all_sizes() -> None:
    draw = random.Random(0)
    costs = [draw.randint(10, 8192) for _ in range(1024)]
    loads = [0] * 8
    for taker, cost in zip(deal(prompts(128, 8), costs, loads), costs, strict=True):
        loads[taker] += cost
    assert max(loads) - min(loads) <= 2 * 8192
