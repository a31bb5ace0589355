"""Seeds of requests on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class _Seeded:
    """SGLang's execution settings, with seeds on."""

    deterministic = SimpleNamespace(enable_deterministic_inference=True)

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._settings, name)


def _heed_seeds(module: Any) -> None:
    """SGLang draws by the seed of a request only with enable_deterministic_inference, which it
    refuses together with the one attention back-end that a CPU has. The sampler that it uses on a
    CPU does know seeds."""
    get_exec = module.get_exec
    module.get_exec = lambda: _Seeded(get_exec())


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """[n, m] of MurmurHash3 (x86, 32 bits, seed 0) of the words seed low, seed high, position,
    column: what SGLang's kernels make of a request's seed. seed, positions [n]; col_indices [m]."""
    bits = seed.view(torch.int64)
    words = (bits & _WORD, bits >> 32 & _WORD, positions.long() & _WORD)
    hashed = torch.zeros(len(seed), 1, dtype=torch.int64)
    for word in (*(word[:, None] for word in words), col_indices.long()[None]):
        mixed = _times(_rotated(_times(word, 0xCC9E2D51), 15), 0x1B873593)
        hashed = (_rotated(hashed ^ mixed, 13) * 5 + 0xE6546B64) & _WORD
    hashed = hashed ^ 16  # bytes hashed
    hashed = _times(hashed ^ hashed >> 16, 0x85EBCA6B)
    hashed = _times(hashed ^ hashed >> 13, 0xC2B2AE35)
    return (hashed ^ hashed >> 16).to(torch.uint32)


def _times(word: Tensor, factor: int) -> Tensor:
    """Modulo 2^32, in halves: the whole product would not fit 63 bits."""
    low = word * (factor & 0xFFFF)
    high = (word * (factor >> 16) & 0xFFFF) << 16
    return (low + high) & _WORD


def _rotated(word: Tensor, bits: int) -> Tensor:
    return (word << bits | word >> 32 - bits) & _WORD


def _hash_in_torch(module: Any) -> None:
    module.murmur_hash32 = murmur_hash32


PATCHES = {
    "sglang.srt.sampling.sampling_batch_info": _heed_seeds,
    "sglang.kernels.ops.sampling.murmur_hash": _hash_in_torch,
}
