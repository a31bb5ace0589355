"""A reward that varies whatever a model says: for trying machinery with a model that knows nothing.

Not for training: it pays for letters, not for answers.
"""

from __future__ import annotations


def letters(response: str, label: str) -> float:
    """The share of ASCII letters among the characters; the label is unused."""
    return sum(c.isascii() and c.isalpha() for c in response) / max(1, len(response))
