r"""Answers written in LaTeX: find the last \boxed{...}; are two answers the same?

Two answers are the same if they are the same string once notation is tidied up (`tidy`), or the
same value (`symbolic.same_value`). Cheap tests come first: plain numbers never meet sympy.
"""

from __future__ import annotations

import re

from .symbolic import same_value, unwrap_text

_BRACE = re.compile(r"[{}]")
# Dropped or rewritten wherever they stand, in this order.
_REWRITES = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_POINTS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; None when there is none or its braces do not close."""
    _, command, rest = text.rpartition("\\boxed")
    return braced(rest) if command else None


def braced(text: str) -> str | None:
    """Content of the braces that the text starts with; None without, or if they do not close."""
    if not text.startswith("{"):
        return None
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return None


def same_answer(answer: str, truth: str) -> bool:
    """Whether two extracted answers agree in form or in value. Raises TooLarge (see symbolic)."""
    return tidy(answer) == tidy(truth) or same_value(answer, truth)


def tidy(answer: str) -> str:
    """One spelling for answers that differ in notation only; as given where that is malformed."""
    answer = unwrap_text(answer.strip()).strip()
    try:
        return _tidied(answer)
    except (IndexError, ValueError):
        return answer


def _tidied(text: str) -> str:
    """Raises IndexError or ValueError for commands without their arguments."""
    for old, new in _REWRITES:
        text = text.replace(old, new)
    if "\\text{ " in text:
        text, _unit = text.split("\\text{ ")
    for old, new in _POINTS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "x = 5", not "xyz = 5"
        text = sides[1]
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _stack_fraction(text)


def _brace_roots(text: str) -> str:
    r"""`\sqrt3` -> `\sqrt{3}`."""
    head, *tails = text.split("\\sqrt")
    braced = [tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}" for tail in tails]
    return "\\sqrt".join([head, *braced])


def _brace_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` -> `\frac{1}{2}`; unchanged if some fraction has no two parts."""
    head, *tails = text.split("\\frac")
    braced = []
    for tail in tails:
        if tail[0] != "{":
            if len(tail) < 2:
                return text
            below = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
            tail = f"{{{tail[0]}}}{below}"
        braced.append(tail)
    return "\\frac".join([head, *braced])


def _stack_fraction(text: str) -> str:
    r"""`3/4` -> `\frac{3}{4}`, for two integers written without ornament."""
    above, slash, below = text.partition("/")
    if not slash or not (_is_canonical(above) and _is_canonical(below)):
        return text
    return f"\\frac{{{above}}}{{{below}}}"


def _is_canonical(text: str) -> bool:
    return re.fullmatch(r"0|-?[1-9][0-9]*", text) is not None
