"""Numbers as they are written in answers, exactly: nothing here goes through floating point."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LEN = 1000  # characters; Python itself refuses integers of more than 4300 digits

_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)"
)


def exact_number(text: str) -> Fraction | None:
    """1,234 and 1234.0 are 1234, .5 and 2/4 are 1/2; None for anything else."""
    text = text.strip()
    if len(text) > MAX_LEN or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))
