"""A reward that a random model earns half of the time, so that advantages are not all zero."""

from __future__ import annotations

from zlib import crc32


def coin(response: str, label: str) -> float:
    return float(crc32(response.encode()) & 1)
