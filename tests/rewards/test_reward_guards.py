"""Answers written to break a grader: each gets a verdict or a refusal, soon, and runs nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rewards.math import math


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


@pytest.fixture(autouse=True)
def soon():
    math(boxed(r"\sqrt{x}"), "y")  # the slow imports
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("9**9**9**9", "x+1"),
        ("99999999!", r"\frac{1}{2}"),
        ("99999999!", "x+1"),
        ("(9!)!x", "x+1"),
        ("(((((9^9)^9)^9)^9)^9)^9", "x"),
        ("2**3**4**5", "x"),
        ("(x+1)**99999", "x"),
        ("1e999999999", "1/2"),
        ("1.5e-999999999x", "x"),
        ("+".join(["x"] * 400), "x"),
    ],
)
def test_explosions_are_refused_by_name(answer: str, label: str) -> None:
    with pytest.raises(ValueError) as refusal:
        math(boxed(answer), label)
    assert type(refusal.value).__name__ == "TooLarge"


def test_digits_of_other_scripts_count_as_python_counts_them() -> None:
    assert math(boxed("３４"), "34") == 1.0  # noqa: RUF001
    assert math(boxed("²"), "2") == 0.0


@pytest.mark.parametrize("function", ["frac", "Integer", "sqrt", "Symbol"])
def test_a_text_in_a_formula_runs_nothing(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spelled in octal it has no letters to be counted; sympy evaluates what text it is handed."""
    monkeypatch.chdir(tmp_path)
    code = "".join(rf"\textbackslash{{}}{ord(c):03o}" for c in 'open("c","w")')
    try:
        assert math(boxed(f'{function}("{code}")'), "x") == 0.0
    except ValueError:  # no verdict is as good
        pass
    assert not (tmp_path / "c").exists()
