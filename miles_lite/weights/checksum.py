"""Checksums of tensor contents, the same on every device and in every process, and of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

_CHUNK = 1 << 22  # elements at a time: bounds scratch to 64 MB
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit number
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> int:
    """Sum of bits times a position-dependent odd weight, modulo 2^64.

    Sensitive to value (bit exact, NaN payloads and signed zeros included), order and length. It
    detects faults, not malice.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64) + 1
        place = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=bits.device)
        total += (chunk * ((place * _ODD) | 1)).sum()
    return int(total)


def file_digest(path: Path) -> str:
    """Of a file's contents; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError:
        return ""
