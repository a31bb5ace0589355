"""What a configuration is refused with, and the plainest reasons."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """The configuration cannot run. Says which key, which value, and the way out."""


def not_negative(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 0:
            raise ConfigError(f"{name} = {getattr(section, name)} is negative")


def positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted at least 1")
