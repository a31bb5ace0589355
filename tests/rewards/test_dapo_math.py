"""The verdicts DAPO users know, row by row."""

from __future__ import annotations

import pytest

from rewards.dapo_math import dapo_math

# (response, label, is it right)
ROWS = [
    ("Answer: 34", "34", True),
    ("answer : 34", "34", True),
    ("Answer:\n34", "34", True),
    ("Answer: $34$", "34", True),
    ("Answer: $34.$", "34", True),
    (r"Answer: \boxed{34}", "34", True),
    ("Answer: x = 34", "34", True),
    ("Answer: 34 cm", "34", True),
    ("Answer: 34 degrees", "34", True),
    ("Answer: 1,234", "1234", True),
    ("Answer: 34<|im_end|>", "34", True),
    ("Answer: 1\nAnswer: 34", "34", True),  # the last one counts
    ("Answer: 34\nAnswer: 1", "34", False),
    ("Answer: 34.", "34", False),
    ("Answer: **34**", "34", False),
    ("**Answer:** 34", "34", False),
    ("Answer: 034", "34", False),
    ("Answer: 34.0", "34", False),
    ("Answer: 34%", "34", False),
    (r"Answer: \frac{68}{2}", "34", False),
    (r"So \boxed{34}.", "34", False),  # no "Answer:"
    ("", "34", False),
    ("Answer: 34", "34.7", True),  # the label is cut to an integer
    ("Answer: 34", "$34$", True),
    ("Answer: -5", "-5", True),
    ("Answer: 34" + "\n" + "x" * 289, "34", True),
    ("Answer: 34" + "\n" + "x" * 290, "34", False),  # only 300 characters are read
]


@pytest.mark.parametrize(("response", "label", "right"), ROWS)
def test_the_last_answer_line_counts(response: str, label: str, right: bool) -> None:
    assert dapo_math(response, label) == (1.0 if right else -1.0)


@pytest.mark.parametrize(
    ("response", "label", "right"),
    [
        (r"so \boxed{34}", "34", True),
        (r"so \boxed{34.0}", "34", False),
        (r"so \boxed{ 34}", "34", False),
        (r"\boxed{34} \boxed 3", "34", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{34", "34", False),
        ("Answer: 34", "34", False),
        (r"\boxed{34}" + "x" * 90, "34", True),
        (r"\boxed{34}" + "x" * 91, "34", False),
    ],
)
def test_strict_wants_the_box_letter_for_letter(response: str, label: str, right: bool) -> None:
    assert dapo_math(response, label, strict=True) == (1.0 if right else -1.0)


@pytest.mark.parametrize("label", ["abc", r"\frac{1}{2}", "", "inf", "nan"])
def test_a_label_that_is_no_number_gives_no_verdict(label: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        dapo_math("Answer: 34", label)


def test_large_labels_are_not_rounded() -> None:
    assert dapo_math("Answer: 9007199254740993", "9007199254740993") == 1.0
    assert dapo_math("Answer: 9007199254740992", "9007199254740993") == -1.0
