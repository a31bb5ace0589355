"""Checksums of tensor contents, the same on every device and in every process."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_CHUNK = 1 << 18  # words at a time: their weights stay in a core's cache
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit number
_WORD = 8  # bytes


def checksum(tensor: Tensor) -> int:
    """Sum of 8-byte words times position-dependent odd weights, modulo 2^64.

    Sensitive to value (bit exact, NaN payloads and signed zeros included), order and length. It
    detects faults, not malice. A sync reads all its bytes here, twice: this must be as fast as
    copying them.
    """
    words, weights = _words(tensor), _weights(tensor.device)
    total = torch.full((), tensor.nbytes, dtype=torch.int64, device=tensor.device)
    for chunk in words.split(_CHUNK):
        total = total * _ODD + _dot(chunk, weights[: len(chunk)])
    return int(total)


def _words(tensor: Tensor) -> Tensor:
    """Its bytes as int64, with zeros for what is missing of the last."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if missing := -flat.numel() % _WORD:
        flat = torch.nn.functional.pad(flat, (0, missing))
    if flat.storage_offset() % _WORD:  # rows of a tensor need not begin at a word
        flat = flat.clone()
    return flat.view(torch.int64)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    return torch.arange(_CHUNK, dtype=torch.int64, device=device) * _ODD | 1


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    """CUDA has no dot product of integers (not run); a CPU needs no memory for this one."""
    return torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()
