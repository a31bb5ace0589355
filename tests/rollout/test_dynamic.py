"""Dynamic sampling keeps the first groups that teach something, whatever finishes first."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_lite.rollout.dynamic import MAX_SPENT, Filled, NothingToKeep, drop_reason, fill
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict


class Stream:
    """Prompts 0, 1, 2, ... with a cursor."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return [
            Prompt(f"s:{i}", (1,), "?", "", "", {}) for i in range(self.position - n, self.position)
        ]

    def put_back(self, n: int) -> None:
        self.position -= n


def group(*verdicts: float | str, uid: str = "s:0") -> Group:
    """Of rewards, or of reasons why there is none."""
    prompt = Prompt(uid, (1,), "?", "", "", {})
    completion = Completion((2,), (-0.1,), 0, Finish.stop)
    given_ = [Verdict(0.0, v) if isinstance(v, str) else Verdict(v, "") for v in verdicts]
    return Group(tuple(Sample(prompt, completion, "", verdict) for verdict in given_))


def rewards_of(uid: str) -> tuple[float, ...]:
    """Every third prompt is too hard, every fifth too easy."""
    number = int(uid.split(":")[1])
    if number % 3 == 0:
        return (0.0, 0.0)
    return (1.0, 1.0) if number % 5 == 0 else (0.0, 1.0)


def run(
    stream: Stream, *, wanted: int, at_once: int, filtered: bool = True, seed: int = 0
) -> tuple[Filled, list[str]]:
    """The outcome, and which prompts were finished by whatever came of it, in their order."""
    delays, finished = random.Random(seed), []

    async def draw(prompt: Prompt) -> Group:
        await asyncio.sleep(delays.random() * 0.004)
        finished.append(prompt.uid)
        return group(*rewards_of(prompt.uid), uid=prompt.uid)

    async def main() -> Filled:
        return await fill(stream, draw, wanted=wanted, at_once=at_once, filtered=filtered)

    return asyncio.run(main()), finished


def uids(filled: Filled) -> list[str]:
    return [g.samples[0].prompt.uid for g in filled.kept]


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(0, 10**6))
def test_timing_and_over_sampling_change_nothing(wanted: int, at_once: int, seed: int) -> None:
    stream = Stream()
    filled, _ = run(stream, wanted=wanted, at_once=at_once, seed=seed)
    useful = [i for i in range(100) if len(set(rewards_of(f"s:{i}"))) > 1][:wanted]
    assert uids(filled) == [f"s:{i}" for i in useful]
    assert stream.position == useful[-1] + 1  # the next step begins behind the last one kept
    assert len(filled.dropped) == useful[-1] + 1 - wanted


def test_the_cost_is_reported() -> None:
    filled, _ = run(Stream(), wanted=4, at_once=32)  # keeps 1, 2, 4, 7
    assert filled.num_put_back == 32 - 8
    assert filled.metrics() == {
        "rollout/prompts_per_kept": 8 / 4,
        "rollout/prompts_put_back": 24.0,
        "rollout/dynamic_filter/drop_zero_std_0.0": 3.0,  # 0, 3, 6
        "rollout/dynamic_filter/drop_zero_std_1.0": 1.0,  # 5
    }


def test_without_the_filter_all_are_kept_and_none_is_asked_twice() -> None:
    stream = Stream()
    filled, finished = run(stream, wanted=6, at_once=0, filtered=False)
    assert uids(filled) == [f"s:{i}" for i in range(6)]
    assert sorted(finished) == sorted(uids(filled))
    assert (stream.position, filled.num_put_back, filled.dropped) == (6, 0, ())


def test_surplus_is_cancelled_not_waited_for() -> None:
    stream, cancelled = Stream(), []

    async def draw(prompt: Prompt) -> Group:
        if int(prompt.uid[2:]) >= 2:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(prompt.uid)
                raise
        return group(0.0, 1.0, uid=prompt.uid)

    async def main() -> Filled:
        return await fill(stream, draw, wanted=2, at_once=5, filtered=True)

    assert uids(asyncio.run(main())) == ["s:0", "s:1"]
    assert cancelled == ["s:2", "s:3", "s:4"]
    assert stream.position == 2


def test_giving_up_names_the_reasons() -> None:
    asked = []

    async def draw(prompt: Prompt) -> Group:
        asked.append(prompt)
        return group(0.0, 0.0)

    async def main() -> Filled:
        return await fill(Stream(), draw, wanted=3, at_once=0, filtered=True)

    with pytest.raises(NothingToKeep, match=r"kept 0 of 3 .*30 x zero_std_0.0.*mean reward 0.000"):
        asyncio.run(main())
    assert len(asked) == 3 * MAX_SPENT


@pytest.mark.parametrize("filtered", [True, False])
def test_a_failing_draw_fails_the_step_at_once(filtered: bool) -> None:
    async def draw(prompt: Prompt) -> Group:
        if prompt.uid == "s:3":
            raise RuntimeError("engine 1 is gone")
        await asyncio.sleep(3600)
        return group(0.0, 1.0)

    async def main() -> Filled:
        return await asyncio.wait_for(
            fill(Stream(), draw, wanted=4, at_once=0, filtered=filtered), timeout=5
        )

    with pytest.raises(RuntimeError, match="engine 1 is gone"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ((0.0, 1.0), ""),
        ((0.5, 0.5), "zero_std_0.5"),
        ((1.0, 1.0 + 1e-12), "zero_std_1.0"),
        ((1.0, "timeout", 1.0), "zero_std_1.0"),  # no verdict is not the reward 0
        ((0.0, "timeout", 1.0), ""),
        ((1.0, "timeout"), "invalid"),
        (("crash", "timeout"), "invalid"),
    ],
)
def test_what_teaches_nothing(verdicts: tuple[float | str, ...], reason: str) -> None:
    assert drop_reason(group(*verdicts)) == reason


def test_what_counts_as_wrong_is_a_reward_of_zero() -> None:
    assert drop_reason(group(1.0, "timeout", 1.0), invalid_is_wrong=True) == ""
    assert drop_reason(group("crash", 0.0, "timeout"), invalid_is_wrong=True) == "zero_std_0.0"
