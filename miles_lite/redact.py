"""Secrets leave no trace: every text and every setting that is written or shown comes through here.

A secret is the value of a variable or setting with a name like *_API_KEY, token or PGPASSWORD; the
user:password@ of an address; and what looks like a key of OpenAI, Hugging Face, W&B or GitHub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
MIN_LEN = 6  # of a secret that is looked for in texts: "1" or "none" is nobody's password

# Looked for with what is before it, not with the name it ends: texts may be long and hostile, and
# this way the time is linear.
_NAME = (
    r"(?:(?<![^\W_])(?:api_?keys?|access_?key(?:_id)?|private_?key|secret(?:_?key)?|token"
    r"|credentials?)|password|passwd|sshpass|(?<=_)pass|(?<=[a-z_])(?<!old)pwd)"
)
_IS_SECRET = re.compile(rf"{_NAME}\Z", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|wandb_v\d_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,})"
    r"|(?<=://)[^\s/@'\"]+(?=@)"
    rf"|(?i:(?<=bearer )[^\s'\"]{{{MIN_LEN},}})"
)
_ASSIGNED = re.compile(rf"({_NAME}['\"]?[=:]\s?['\"]?)([^\s'\",}}&]{{{MIN_LEN},}})", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether what has this name, in an environment or a configuration, is to stay secret."""
    return bool(_IS_SECRET.search(name))


def redacted(text: str) -> str:
    """`text` without the secrets in it."""
    for value in _in_environment():
        text = text.replace(value, HIDDEN)
    return _by_looks(text)


def _by_looks(text: str) -> str:
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _SHAPES.sub(HIDDEN, text))


def redacted_settings(value: Any, name: str = "") -> Any:
    """Nested settings, or a list of words, without the secrets in them."""
    if isinstance(value, Mapping):
        return {key: redacted_settings(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_settings(entry, name) for entry in value]
    if isinstance(value, str) and value:
        return HIDDEN if is_secret(name) else redacted(value)
    return value


def without_secrets(environment: Mapping[str, str], but: frozenset[str]) -> dict[str, str]:
    """Also without those that hold one, as the address of a proxy or a database may. but: names
    that whoever gets this environment was promised."""
    return {
        name: value
        for name, value in environment.items()
        if name in but or not (is_secret(name) or _by_looks(value) != value)
    }


def _in_environment() -> list[str]:
    """The longest first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if is_secret(name)}
    return sorted((value for value in found if len(value) >= MIN_LEN), key=len, reverse=True)
