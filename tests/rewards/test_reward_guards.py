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


@pytest.mark.parametrize("label", ["5", "1/2", "x+1"])
@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {path}')",
        "().__class__.__base__.__subclasses__()",
        "x.__class__",
        "lambda:x",
        "x[0]",
        "x if x else x",
        "'a'*9**9",
        "\x00",
        "5\x00",
        "\ud800",
        "nan",
        "inf",
        "1/0",
        r"\input{/etc/passwd}",
        "(" * 200 + "x" + ")" * 200,
        "-" * 490 + "x",
        "{" * 400 + "x" + "}" * 400,
    ],
)
def test_nonsense_is_wrong_and_runs_nothing(answer: str, label: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    assert math(boxed(answer.replace("{path}", str(target))), label) == 0.0
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{" * 1_000_000,
        "\\boxed{" * 150_000,
        boxed("{" * 500_000 + "}" * 500_000),
        boxed("\\frac" * 200_000),
        boxed("1," * 500_000),
        boxed("cm " * 300_000),
        boxed(" " * 1_000_000 + "x"),
        boxed("9" * 1_000_000),
    ],
)
def test_a_megabyte_is_read_once(text: str) -> None:
    assert math(text, "34") == 0.0


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
