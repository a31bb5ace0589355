"""The group reward that ranks right answers by length."""

from __future__ import annotations

import pytest

from rewards.brevity import brevity

RIGHT = r"\boxed{34}"
WRONG = r"\boxed{35}"


def test_shorter_right_answers_score_more_and_wrong_ones_nothing() -> None:
    answers = ["xx" + RIGHT, WRONG, RIGHT, "xxx" + RIGHT, "yy" + RIGHT]
    assert [graded.reward for graded in brevity(answers, "34")] == [0.75, 0.0, 1.0, 0.5, 0.75]
    assert [graded.reward for graded in brevity(answers, "34", slope=0.0)] == [1, 0, 1, 1, 1]


def test_alone_it_scores_in_full() -> None:
    assert brevity([RIGHT], "34")[0].reward == 1.0
    assert brevity([WRONG, WRONG], "34") == [(0.0, ""), (0.0, "")]


def test_a_hostile_answer_spoils_only_itself() -> None:
    graded = brevity([r"\boxed{9**9**9**9}", r"\boxed{1+x}"], "x+1")
    assert graded == [(0.0, "error: TooLarge"), (1.0, "")]


def test_a_slope_that_turns_the_order_round_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slope = 1\.0"):
        brevity([RIGHT], "34", slope=1.0)
