"""Which endings of a driver are accidents, and whole runs that survive them."""

from __future__ import annotations

import pytest

from miles_lite.stop import ENDED_ITSELF
from miles_lite.supervise import (
    FIRST_WAIT_S,
    MAX_WAIT_S,
    SAME_DEATHS,
    SAME_ERRORS,
    Ending,
    decide,
)

KILLED = Ending(137, 3, "the driver was killed by SIGKILL")
BUG = Ending(1, 3, "KeyError: 'a'")


@pytest.mark.parametrize("code", [0, 2, ENDED_ITSELF, 130, 143])
def test_what_ends_for_a_reason_is_not_started_again(code: int) -> None:
    assert not decide([Ending(code, 3, "")], 10).again


@pytest.mark.parametrize("code", [1, 134, 137, 139])
def test_a_crash_is_an_accident(code: int) -> None:
    decision = decide([Ending(code, 3, "so it was")], 10)
    assert decision.again and decision.why == "so it was" and decision.wait_s == FIRST_WAIT_S


def test_restarts_are_bounded() -> None:
    endings = [Ending(137, step, "killed by SIGKILL") for step in range(4)]
    assert decide(endings[:3], 3).again
    assert not decide(endings, 3).again and "3 times" in decide(endings, 3).why
    assert not decide(endings[:1], 0).again


def test_the_wait_doubles_until_there_is_progress() -> None:
    """Different errors at the same step are not one bug."""
    stuck = [Ending(1, 3, cause) for cause in "abcdefghij"]
    waits = [decide(stuck[:n], 99).wait_s for n in range(1, 11)]
    assert waits[:4] == [FIRST_WAIT_S * 2**n for n in range(4)] and waits[-1] == MAX_WAIT_S
    assert decide([*stuck, Ending(1, 4, "j")], 99).wait_s == FIRST_WAIT_S


def test_the_same_error_at_the_same_step_is_a_bug() -> None:
    assert decide([BUG] * (SAME_ERRORS - 1), 99).again
    given_up = decide([BUG] * SAME_ERRORS, 99)
    assert not given_up.again and "2 times in a row it ended after 3 steps" in given_up.why
    further = Ending(1, 4, BUG.cause)
    assert decide([BUG, further], 99).again
    assert decide([BUG, KILLED, BUG], 99).again


def test_numbers_make_no_other_error() -> None:
    one, other = (Ending(1, 3, f"OSError: port {n} of actor {n:016x}") for n in (99, 170))
    assert not decide([one, other], 99).again
    assert decide([one, Ending(1, 3, "OSError: no port")], 99).again


def test_a_process_may_be_killed_twice_at_the_same_step() -> None:
    for end in (KILLED, Ending(1, 3, "trainer rank 0 failed in 'step': The actor died")):
        assert decide([end] * SAME_ERRORS, 99).again
        assert not decide([end] * SAME_DEATHS, 99).again
