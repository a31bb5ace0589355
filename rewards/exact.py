"""Reward for answers that are one number or one word: 1 if it equals the label, else 0.

Without a marker the whole text after the thinking is the answer. With one, such as "####" (GSM8K)
or "Answer:", it is what follows the marker's last occurrence on that line.
"""

from __future__ import annotations

import re

from .number import exact_number

# Stop tokens are part of the text: <|im_end|>, </s>, <eos>, <SPECIAL_12>. So near its end:
STOP_LEN = 200
_SPECIAL_TOKENS = re.compile(r"(?:\s*<(?:\|[^<>|\s]+\||/?[A-Za-z_0-9]+)>)+\s*\Z")


def exact(response: str, label: str, *, marker: str = "") -> float:
    """1.0 for the same string or the same number (1,234 = 1234.0, 1/2 = 0.5), else 0.0.

    `marker` is case-sensitive; an answer without it is wrong.
    """
    answer = response.rpartition("</think>")[2]
    if marker:
        _, found, rest = answer.rpartition(marker)
        if not found:
            return 0.0
        answer = rest.partition("\n")[0]
    answer = answer[:-STOP_LEN] + _SPECIAL_TOKENS.sub("", answer[-STOP_LEN:])
    answer, truth = answer.strip(), label.strip()
    if answer == truth:
        return 1.0
    number = exact_number(answer)
    return float(number is not None and number == exact_number(truth))
