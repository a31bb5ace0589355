r"""Reward of the DAPO recipe: +1 if the last line "Answer: ..." holds the label, else -1.

Only the end of the response is read. Answers are compared as strings, after units, a few words and
LaTeX ornaments have been dropped; the label is an integer. The lists below are the published rules:
a verdict depends on their order as well.
"""

from __future__ import annotations

import re

from .latex import braced

READ_LEN = 300  # characters at the end of a response
STRICT_READ_LEN = 100

_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_DROPPED = (
    *"square ways integers dollars mph inches hours km units".split(),
    r"\ldots",
    *"sue points feet minutes digits cents degrees cm gm pounds meters meals edges".split(),
    *"students childrentickets multiples".split(),
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
    *("<|im_end|>", "<|endoftext|>"),
)
_REWRITTEN = (
    (re.compile(r"(.*?)\$(.*?)\$(.*)"), r"$\2$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def dapo_math(response: str, label: str, *, strict: bool = False) -> float:
    r"""1.0 or -1.0. With `strict` the last \boxed{...} must be the label, letter for letter.

    Raises ValueError for a label that is no number; 34.7 counts as 34, as published.
    """
    if strict:
        _, box, rest = response[-STRICT_READ_LEN:].rpartition("\\boxed{")
        return 1.0 if box and braced("{" + rest) == label else -1.0
    found = _ANSWER.findall(response[-READ_LEN:])
    return 1.0 if _integer(label) == normal_form(found[-1] if found else "") else -1.0


def normal_form(answer: str) -> str:
    """What is compared: the right side of an equation, bare."""
    answer = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for text in _DROPPED:
        answer = answer.replace(text, "")
    for pattern, new in _REWRITTEN:
        answer = pattern.sub(new, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()


def _integer(label: str) -> str:
    number = normal_form(label)
    try:
        return str(int(number))
    except ValueError:
        pass  # a decimal
    try:
        return str(int(float(number)))
    except (ValueError, OverflowError):
        raise ValueError(f"label {label!r} is no number, and dapo_math knows only those") from None
