"""A run whose rewards teach nothing ends with the likely cause, and only such a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles_lite.algo.credit import CreditSettings, rollout_metrics, to_sequences
from miles_lite.compose import compose
from miles_lite.rollout.signal import NoSignalError, SignalWatch
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict

CREDIT = CreditSettings.of(compose(["experiment=tiny"]))


def group(*rewards: float | str) -> Group:
    """Of rewards, or of reasons why there is none."""
    prompt = Prompt("set:0", (1,), "17+17?", "34", "", {})
    completion = Completion((5, 6), (-1.0, -1.0), 0, Finish.length)
    verdicts = [Verdict(0.0, r) if isinstance(r, str) else Verdict(r, "") for r in rewards]
    return Group(tuple(Sample(prompt, completion, "\\boxed{3", v) for v in verdicts))


def look(watch: SignalWatch, *groups: Group, credit: CreditSettings = CREDIT) -> None:
    watch.look(groups, rollout_metrics(groups, to_sequences(groups, credit), credit))


def test_dead_steps_in_a_row_end_the_run() -> None:
    watch = SignalWatch(3)
    look(watch, group(0, 0), group(1, 1))
    look(watch, group(0, 0))
    with pytest.raises(NoSignalError, match=r"3 steps in a row .* reward-audit.*max_dead_steps=0"):
        look(watch, group(0, 0))


def test_one_step_that_teaches_starts_the_count_again() -> None:
    watch = SignalWatch(2)
    for _ in range(3):
        look(watch, group(0, 0))
        look(watch, group(0, 0), group(1, 0))


def test_answers_without_verdict_teach_nothing_and_are_named() -> None:
    with pytest.raises(NoSignalError, match=r"2 of 2 answers without verdict \(timeout\)"):
        look(SignalWatch(1), group("timeout", "timeout"))


def test_zero_never_ends_it() -> None:
    watch = SignalWatch(0)
    for _ in range(100):
        look(watch, group(0, 0))


def test_rewards_that_whitening_will_level_teach_nothing() -> None:
    credit = CreditSettings.of(
        compose(
            [
                "experiment=tiny",
                "algo.advantage_estimator=reinforce_plus_plus",
                "algo.whiten=true",
            ]
        )
    )
    with pytest.raises(NoSignalError, match="rewards between 1 and 1"):
        look(SignalWatch(1), group(1, 1), group(1, 1), credit=credit)
    look(SignalWatch(1), group(1, 0), credit=credit)
    look(SignalWatch(1), group(1, 1), group(0, 0), credit=credit)  # the batch is the baseline


def test_what_length_alone_distinguishes_teaches_nothing() -> None:
    short, long = (group(0, 0).samples[0] for _ in range(2))
    long = replace(long, completion=Completion((5,) * 20, (-1.0,) * 20, 0, Finish.length))
    credit = replace(CREDIT, max_response_len=20, overlong_buffer=10, overlong_penalty=1.0)
    groups = [Group((short, long))]
    assert {s.advantage > 0 for s in to_sequences(groups, credit)} == {True, False}
    with pytest.raises(NoSignalError, match="rewards between 0 and 0"):
        look(SignalWatch(1), *groups, credit=credit)
