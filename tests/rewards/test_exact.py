"""Equal as strings or as exact numbers, and nothing more lenient than that."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.exact import exact
from rewards.number import exact_number


@pytest.mark.parametrize(
    ("response", "label", "marker", "verdict"),
    [
        ("34", "34", "", 1),
        (" 34 \n", "34", "", 1),
        ("<think>17 or 34</think>34<|im_end|>", "34", "", 1),
        ("34</s>", "34", "", 1),
        ("34<SPECIAL_12>\n", "34", "", 1),
        ("1,234", "1234.0", "", 1),
        ("1/2", "0.5", "", 1),
        ("-.50", "-1/2", "", 1),
        ("Paris", "Paris", "", 1),
        ("paris", "Paris", "", 0),
        ("34.", "34", "", 1),
        ("12,34", "1234", "", 0),
        ("0.3333333333333333", "1/3", "", 0),
        ("9007199254740993", "9007199254740992", "", 0),
        ("0.1", "0.1000000000000000055511151231257827", "", 0),  # the double nearest to 0.1
        ("1e3", "1000", "", 0),
        ("1/0", "0", "", 0),
        ("nan", "inf", "", 0),
        ("", "0", "", 0),
        ("9" * 10_000, "9", "", 0),
        ("so\n#### 72", "72", "####", 1),
        ("#### 1\n#### 1,234 \nbye", "1234", "####", 1),
        ("Answer: 7 apples", "7", "Answer:", 0),
        ("so 72", "72", "####", 0),
        ("#### 72</think>72", "72", "####", 0),  # marked while thinking only
    ],
)
def test_verdicts(response: str, label: str, marker: str, verdict: float) -> None:
    assert exact(response, label, marker=marker) == verdict


@pytest.mark.timeout(5)
@pytest.mark.parametrize("text", ["a" + " " * 1_000_000 + "b", "<s>" * 300_000, "</" * 500_000])
def test_a_megabyte_is_read_once(text: str) -> None:
    assert exact(text, "34") == exact(f"#### {text}", "34", marker="####") == 0.0


@given(st.integers(), st.integers())
def test_integers_with_and_without_commas(left: int, right: int) -> None:
    assert exact(f"{left:,}", f"{right}.0") == float(left == right)


@given(st.fractions(), st.decimals(allow_nan=False, allow_infinity=False, places=5))
def test_numbers_are_read_exactly(fraction, decimal) -> None:
    assert exact_number(f"{fraction.numerator}/{fraction.denominator}") == fraction
    assert exact_number(f"{decimal:f}") == Fraction(decimal)
