r"""Reward by the math-verify library (pip install math-verify): 1 for an equal value, else 0.

More lenient than `math`: sets, matrices, inequalities, percentages, units, and answers outside a
\boxed. The library's time-outs use signal.alarm and cancel other alarms; they are switched off,
because the worker process this runs in has limits of its own.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import math_verify as library  # nothing in this folder is found without a dot

from .latex import last_boxed
from .number import exact_number

logging.getLogger(library.__name__).setLevel(logging.ERROR)  # it warns of having no time-out

MAX_ANSWER_LEN = 500  # characters of a boxed answer, or of a label
READ_LEN = 1000  # characters at the end of a response without a box


class AnswerTooLong(ValueError):
    """Longer than any right answer: no verdict."""


def math_verify(response: str, label: str) -> float:
    r"""1.0 or 0.0 for the last \boxed{...} after the thinking, or else for the text there.

    Raises AnswerTooLong, and ValueError for a label that means nothing.
    """
    truth = last_boxed(label) or label
    said = response.rpartition("</think>")[2]
    boxed = last_boxed(said)
    if boxed is None:
        return float(_verified(said[-READ_LEN:], truth))
    left, right = exact_number(boxed), exact_number(truth)
    if left is not None and right is not None:
        if left == right:
            return 1.0
        if left.denominator == right.denominator == 1:  # decimals may agree after rounding
            return 0.0
    if len(boxed) > MAX_ANSWER_LEN:
        raise AnswerTooLong(f"a boxed answer of {len(boxed)} characters")
    return float(_verified(f"\\boxed{{{boxed}}}", truth))


def _verified(text: str, truth: str) -> bool:
    gold = _parsed_label(truth)
    return library.verify(gold, _parse(text), timeout_seconds=None, raise_on_error=True)


@functools.lru_cache(maxsize=1024)
def _parsed_label(truth: str) -> list[Any]:
    if len(truth) > MAX_ANSWER_LEN:
        raise AnswerTooLong(f"a label of {len(truth)} characters")
    gold = _parse(f"\\boxed{{{truth}}}")
    if not gold:
        raise ValueError(f"math-verify finds no answer in label {truth!r}")
    return gold


def _parse(text: str) -> list[Any]:
    return library.parse(text, parsing_timeout=0)
