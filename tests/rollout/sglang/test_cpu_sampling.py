"""The hash behind seeds, against the published algorithm on plain integers."""

from __future__ import annotations

import struct

import torch

from miles_lite.rollout.sglang.cpu.sampling import murmur_hash32


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words."""
    h = 0
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 % 2**32
        k = ((k << 15) | (k >> 17)) % 2**32
        h ^= k * 0x1B873593 % 2**32
        h = ((h << 13) | (h >> 19)) % 2**32
        h = (h * 5 + 0xE6546B64) % 2**32
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h ^ (h >> 16)


def test_reference_is_murmur3() -> None:
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"") == 0


def test_hash_of_seed_position_and_column() -> None:
    seeds, positions = [0, 1, 2**31, 2**32 + 7, 2**63 - 1], [0, 5, 1023, 70_000, 2**31 - 1]
    columns = [0, 1, 127, 131_071]
    found = murmur_hash32(
        torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns)
    )
    assert found.tolist() == [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
