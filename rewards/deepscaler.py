r"""Reward of a thinking model: 1 if the last \boxed{...} after its thinking equals the label.

The answer is looked for after the last </think> (or after ###Response), so a model that does not
think, or is cut while thinking, always scores 0: use `math` there. Change this file freely; it sees
only the generated text. Siblings are imported as `.name`, which is why `math.py` may have its name.
"""

from __future__ import annotations

from .latex import last_boxed, same_answer


def deepscaler(response: str, label: str | int | float) -> float:
    """1.0 or 0.0. Raises TypeError for a label of another type, TooLarge for a hostile answer."""
    if not isinstance(label, str | int | float):
        raise TypeError(f"label must be str, int or float, not {type(label).__name__}")
    answer = last_boxed(final_part(response))
    truth = last_boxed(str(label)) if "\\boxed" in str(label) else str(label)
    if answer is None or truth is None or label == "":
        return 0.0
    return float(same_answer(answer, truth))


def final_part(response: str) -> str:
    """What is said after the thinking; empty when the thinking never ends."""
    if "</think>" in response:
        return response.rpartition("</think>")[2]
    parts = response.split("###Response", 2)
    return parts[1] if len(parts) > 1 else ""
