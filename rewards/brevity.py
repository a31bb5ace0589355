"""Reward of a whole group, to copy: right answers score, and shorter ones score more.

A function whose first parameter is called `responses` sees all answers to one prompt at once.
"""

from __future__ import annotations

from typing import NamedTuple

from .math import math


class Graded(NamedTuple):
    reward: float
    reason: str  # why there is no verdict; "" when there is one


def brevity(responses: list[str], label: str, *, slope: float = 0.5) -> list[Graded]:
    """Wrong answers 0; right ones from 1 for the shortest to 1 - slope for the longest, by rank.

    Length is counted in characters; equally long answers score the same. `slope` below 1 keeps a
    long right answer above a wrong one.
    """
    if not 0 <= slope < 1:
        raise ValueError(f"slope = {slope}: wanted 0 <= slope < 1")
    graded = [_grade(response, label) for response in responses]
    right = [len(text) for text, of in zip(responses, graded, strict=True) if of.reward]
    lengths = sorted(set(right))
    step = slope / max(len(lengths) - 1, 1)
    return [
        Graded(1 - step * lengths.index(len(text)), "") if of.reward else of
        for text, of in zip(responses, graded, strict=True)
    ]


def _grade(response: str, label: str) -> Graded:
    try:
        return Graded(math(response, label), "")
    except ValueError as error:  # one hostile answer spoils only itself
        return Graded(0.0, f"error: {type(error).__name__}")
