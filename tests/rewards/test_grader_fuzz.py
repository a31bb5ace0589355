"""Any answer at all: a number, or a refusal by name; the same one twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.brevity import brevity
from rewards.dapo_math import dapo_math, normal_form
from rewards.deepscaler import deepscaler
from rewards.exact import exact
from rewards.latex import last_boxed, tidy
from rewards.math import math

WORDS = st.sampled_from(
    r"""
    { } ( ) [ ] \boxed{ \frac \frac{1}{2} \sqrt \sqrt{ \text{ \left \right ^ ^{ _ ** * / + - = , .
    ! \circ \% $ \$ \; \! x y pi sqrt( 1 2 9 34 1e5 1,000 0.5 <= \in \cup or and cm degrees
    Answer: answer </think> <think> ###Response #### <|im_end|> \\ \pm infty i e ln( &
    \begin{matrix}
    """.split()
)
TEXT = st.lists(WORDS | st.text(max_size=3), max_size=12).map("".join)
ANSWER = st.one_of(
    TEXT,
    TEXT.map(lambda text: f"</think>\\boxed{{{text}}}\nAnswer: {text}"),
)
LABELS = st.sampled_from(["34", "1/2", r"\frac{1}{2}", "x+1", "(1,2)", "-0.5", "1,000"])
FUZZ = settings(max_examples=250, derandomize=True)


def strict(response: str, label: str) -> float:
    return dapo_math(response, label, strict=True)


def shortest(response: str, label: str) -> float:
    (result,) = brevity([response], label)
    return result.reward


def graded(grade: Callable[[str, str], float], response: str, label: str) -> float | str:
    try:
        return grade(response, label)
    except ValueError as error:  # our own, whose names are the reasons that are counted
        assert type(error).__name__ == "TooLarge" or "label" in str(error), repr(error)
        return type(error).__name__


@pytest.mark.parametrize("grade", [deepscaler, math, dapo_math, strict, exact, shortest])
def test_any_answer(grade: Callable[[str, str], float]) -> None:
    @FUZZ
    @given(response=ANSWER, label=LABELS)
    def tried(response: str, label: str) -> None:
        verdict = graded(grade, response, label)
        assert verdict in (1.0, 0.0, -1.0, "TooLarge", "ValueError"), verdict
        assert graded(grade, response, label) == verdict

    tried()


@FUZZ
@given(text=TEXT)
def test_reading_an_answer_never_fails(text: str) -> None:
    assert isinstance(tidy(text), str)
    assert isinstance(normal_form(text), str)
    boxed = last_boxed(text)
    assert boxed is None or f"\\boxed{{{boxed}}}" in text
