"""The verdicts users know, row by row: what `deepscaler` and `math` say of an answer."""

from __future__ import annotations

import pytest

from rewards.deepscaler import deepscaler
from rewards.math import math

# (whole response, label, deepscaler, math)
WHOLE = [
    (r"so \boxed{34}", "34", 0, 1),  # no think marker
    (r"\boxed{34}</think> done", "34", 0, 1),  # box before the marker
    (r"a</think>b\boxed{1}</think>c\boxed{34}", "34", 1, 1),  # the last marker wins
    (r"###Response \boxed{34}", "34", 1, 1),
    (r"###Response \boxed{1} ###Response \boxed{34}", "34", 0, 1),  # the second piece counts
    ("", "34", 0, 0),
    ("</think>", "34", 0, 0),
]

# (text after </think>, label, verdict of both)
AFTER_THINKING = [
    (r"\boxed{1} then \boxed{34}", "34", 1),
    (r"\boxed{34} then \boxed{1}", "34", 0),
    (r"\boxed {34}", "34", 0),
    (r"\boxed 34", "34", 0),
    (r"\boxed{34", "34", 0),
    (r"\boxed{34} or \boxed{34", "34", 0),
    (r"\boxed{}", "34", 0),
    (r"\fbox{34}", "34", 0),
    (r"\boxed{\boxed{34}}", "34", 1),
    (r"\boxed{34}<|im_end|>", "34", 1),
    (r"\boxed{34}", 34, 1),
    (r"\boxed{34}", 34.0, 1),
    (r"\boxed{34}", "34.0", 1),
    (r"\boxed{34}", r"\boxed{34}", 1),
    (r"\boxed{34}", r"\boxed 34", 0),
    (r"\boxed{34}", "", 0),
    (r"\boxed{}", r"\boxed{}", 1),
    (r"\boxed{0}", "0", 1),
]

# (content of \boxed{...}, label, verdict of both)
BOXED = [
    ("34", "34", 1),
    ("35", "34", 0),
    ("-34", "34", 0),
    (" 34 ", "34", 1),
    ("034", "34", 1),
    ("34.0", "34", 1),
    (r"\$34", "34", 1),
    ("$34$", "34", 1),
    ("1,234", "1234", 1),
    ("1234", "1,234", 1),
    ("1{,}234", "1234", 1),
    ("1,234,567", "1234567", 1),
    (r"1\,234", "1234", 0),
    (r"50\%", "50", 1),
    ("x=5", "5", 1),
    ("x = 5", "5", 1),
    ("xyz=5", "5", 0),
    (r"90^\circ", "90", 1),
    (r"5 \text{ cm}", "5", 1),
    (r"5\text{ cm}^2", "5", 1),
    ("3 million", "3000000", 0),
    ("2^{10}", "1024", 0),
    ("2^3", "8", 0),
    (r"\sqrt{4}", "2", 0),
    (r"\frac{1}{2}", "0.5", 1),
    ("0.5", r"\frac{1}{2}", 1),
    (".5", "1/2", 1),
    ("1/2", r"\frac{1}{2}", 1),
    (r"\frac{1}{2}", "1/2", 1),
    (r"\frac12", r"\frac{1}{2}", 1),
    (r"\frac1{2}", r"\frac{1}{2}", 1),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", 1),
    ("0.25", "1/4", 1),
    ("0.26", "1/4", 0),
    ("0.333", "1/3", 0),
    (r"7\frac{3}{4}", "31/4", 1),
    (r"7\frac{3}{4}", r"\frac{31}{4}", 1),
    ("2/4", "1/2", 0),
    ("3x/2", r"\frac{3}{2}x", 0),  # counts as a fraction
    ("5%", "x=5", 0),  # only an escaped percent sign goes
    (r"5\%", "x=5", 1),
    (r"1-n^\\-1", "1-n^-1", 1),  # a broken line
    ("5 focmot", "5 foot", 1),  # units go one after the other
    (r"\sqrt{8}", r"2\sqrt{2}", 1),
    (r"\sqrt8", r"2\sqrt2", 1),
    (r"\sqrt{8}", r"2\sqrt{3}", 0),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("x^2+2x+2", "(x+1)^2", 0),
    ("a+b+c", "c+b+a", 0),  # three letters
    ("a+b", "b+a", 1),
    (r"\pi", r"\frac{2\pi}{2}", 1),
    ("(1, 2)", "(1,2)", 1),
    (r"\left(1, 2\right)", "(1,2)", 1),
    ("(0.5,1)", "(1/2,1)", 1),
    ("(x+x,1)", "(2x,1)", 1),
    (r"(0.5, \sqrt{8})", r"(\frac{1}{2}, 2\sqrt{2})", 0),  # brackets within: not split
    (r"\text{B}", "B", 1),
    ("b", "B", 1),
    ("[1,2)", "(1,2)", 0),
    ("(2,1)", "(1,2)", 0),
    ("(1,2,3)", "(1,2)", 0),
    ("1,2", "2,1", 0),
    ("x**2", "x^2", 1),
    ("x^2+x", "x(x+1)", 1),
    ("120x", "5!x", 1),
    ("9^{9^{9}}", "x+1", 0),
    ("", "", 0),
]


@pytest.mark.parametrize(("response", "label", "of_deepscaler", "of_math"), WHOLE)
def test_whole_response(response: str, label: str, of_deepscaler: float, of_math: float) -> None:
    assert deepscaler(response, label) == of_deepscaler
    assert math(response, label) == of_math


@pytest.mark.parametrize(("text", "label", "verdict"), AFTER_THINKING)
def test_after_thinking(text: str, label: str | float, verdict: float) -> None:
    assert deepscaler(f"Let me think.</think>{text}", label) == verdict
    assert math(text, label) == verdict


@pytest.mark.parametrize(("answer", "label", "verdict"), BOXED)
def test_boxed(answer: str, label: str, verdict: float) -> None:
    text = f"hm</think>So \\boxed{{{answer}}}."
    assert deepscaler(text, label) == verdict
    assert math(text, label) == verdict


def test_labels_that_are_missing() -> None:
    zero = r"</think>\boxed{0}"
    assert (deepscaler(zero, 0), math(zero, 0)) == (1.0, 0.0)  # the number 0 is missing for `math`
    assert math(r"\boxed{34}", None) == 0.0
    with pytest.raises(TypeError, match="label"):
        deepscaler(r"</think>\boxed{34}", None)


def test_plain_numbers_need_no_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, decimals and fractions are settled without sympy and pylatexenc."""
    pairs = [("34", "34"), ("35", "34"), ("0.25", "1/4"), ("2/4", "1/2"), ("1,234", "1234")]
    for name in ("sympy", "parser", "LatexNodes2Text"):
        monkeypatch.setattr(f"rewards.symbolic.{name}", None)
    assert [math(f"\\boxed{{{a}}}", b) for a, b in pairs] == [1.0, 0.0, 1.0, 0.0, 1.0]
