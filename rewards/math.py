r"""Reward of any model asked for \boxed{...}: 1 if the last one equals the label, else 0.

Like `deepscaler` without the thinking: the box may stand anywhere. Change this file freely; it sees
only the generated text. Siblings are imported as `.name`, so this file never hides Python's `math`.
"""

from __future__ import annotations

from .latex import last_boxed, same_answer


def math(response: str, label: str | int | float | None) -> float:
    """1.0 or 0.0; a missing label ("", None, and the number 0, but not "0") is never matched.

    Raises TooLarge for a hostile answer.
    """
    if not label:
        return 0.0
    answer = last_boxed(response)
    truth = last_boxed(str(label)) if "\\boxed" in str(label) else str(label)
    if answer is None or truth is None:
        return 0.0
    return float(same_answer(answer, truth))
