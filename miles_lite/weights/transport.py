"""Moving buckets of weights between processes of one host, through shared memory.

A trainer rank packs slices into shared memory, the engine rank copies them out into its live
parameters. Two slots per sender bound the memory; a slot is used again once its reader is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch

from miles_lite.protocols import Bucket
from miles_lite.weights.checksum import checksum
from miles_lite.weights.plan import Copy, Place, Route, aligned


class WeightSyncError(RuntimeError):
    """A sync did not bring an engine rank to the trainer's weights. Names rank and tensor."""


def view(tensors: Callable[[str], torch.Tensor], place: Place, count: int) -> torch.Tensor:
    """The live rows that `place` names."""
    tensor = tensors(place.param)
    if place.index >= 0:
        tensor = tensor[place.index]
    return tensor.narrow(place.dim, place.offset, count)


def bucket_bytes(copies: Sequence[Copy]) -> int:
    """Room that a bucket of these copies takes."""
    return sum(aligned(copy.num_bytes) for copy in copies)


class Slots:
    """A sender's two pieces of shared memory, reached by `paths` from other processes of the host.

    They are anonymous files: they need no room in /dev/shm, and are gone with the last process that
    maps them, however it ended.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._files = [os.memfd_create("miles-lite-sync") for _ in range(2)]
        for file in self._files:
            os.ftruncate(file, slot_bytes)
        self.paths = [f"/proc/{os.getpid()}/fd/{file}" for file in self._files]
        self.slots = [_map(path, slot_bytes) for path in self.paths]

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _map(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def pack(
    tensors: Callable[[str], torch.Tensor],
    copies: Sequence[Copy],
    dtype: torch.dtype,
    slot: torch.Tensor,
) -> int:
    """Lay the copies into `slot` one after the other, in wire dtype; returns the bytes used."""
    offset = 0
    for copy in copies:
        rows = view(tensors, copy.source, copy.stop - copy.start)
        wire = torch.float32 if copy.fp32 else dtype
        room = slot[offset : offset + copy.num_bytes].view(wire).view(rows.shape)
        room.copy_(rows)
        offset += aligned(copy.num_bytes)
    return offset


def source_checksums(
    tensors: Callable[[str], torch.Tensor], copies: Sequence[Copy], dtype: torch.dtype
) -> list[int]:
    """Of what should arrive, computed from the trainer's live parameters and not from a bucket."""
    sums = []
    for copy in copies:
        rows = view(tensors, copy.source, copy.stop - copy.start)
        sums.append(checksum(rows.to(torch.float32 if copy.fp32 else dtype)))
    return sums


class Inbox:
    """The receiving half on an engine rank.

    routes: those that end here, in plan order. Counts what arrives, so that a bucket lost, doubled
    or of another version is an error before the engine speaks.
    """

    def __init__(
        self,
        name: str,
        tensors: Callable[[str], torch.Tensor],
        routes: Mapping[int, Route],
        dtype: torch.dtype,
    ) -> None:
        self._name = name
        self._tensors = tensors
        self._routes = routes
        self._dtype = dtype
        self._maps: dict[str, torch.Tensor] = {}
        self._arrived: dict[int, int] = dict.fromkeys(routes, 0)  # source rank -> next bucket

    def load(self, source: int, number: int, bucket: Bucket) -> None:
        """Copy bucket `number` of trainer rank `source` into the live parameters."""
        expected = self._arrived[source]
        if number != expected:
            raise WeightSyncError(
                f"{self._name}: bucket {number} from trainer rank {source} came, {expected} was due"
            )
        path, slot_bytes = bucket.handle
        if path not in self._maps:
            self._maps[path] = _map(path, slot_bytes)
        slot, offset = self._maps[path], 0
        for copy in self._routes[source].buckets[number]:
            rows = view(self._tensors, copy.target, copy.stop - copy.start)
            wire = torch.float32 if copy.fp32 else self._dtype
            rows.copy_(slot[offset : offset + copy.num_bytes].view(wire).view(rows.shape))
            offset += aligned(copy.num_bytes)
        if offset != bucket.num_bytes:
            raise WeightSyncError(
                f"{self._name}: bucket {number} from trainer rank {source} has {bucket.num_bytes} "
                f"bytes, the plan says {offset}"
            )
        self._arrived[source] += 1

    def finish(self) -> dict[int, list[int]]:
        """Check that all came; checksums of the live parameters by source rank, in plan order."""
        for source, arrived in self._arrived.items():
            due = self._routes[source].buckets
            if arrived < len(due):
                missing = due[arrived][0]
                raise WeightSyncError(
                    f"{self._name}: {len(due) - arrived} of {len(due)} buckets from trainer rank "
                    f"{source} did not arrive, first missing {missing.tensor!r}"
                )
            self._arrived[source] = 0
        self._maps.clear()
        return {source: self._checksums(route.copies) for source, route in self._routes.items()}

    def _checksums(self, copies: Sequence[Copy]) -> list[int]:
        sums = []
        for copy in copies:
            rows = view(self._tensors, copy.target, copy.stop - copy.start)
            sums.append(checksum(rows.to(torch.float32 if copy.fp32 else self._dtype)))
        return sums


def compare(
    engine_rank: str, copies: Sequence[Copy], sent: Sequence[int], received: Sequence[int]
) -> None:
    """Raise WeightSyncError naming the first slice whose checksums differ."""
    for copy, ours, theirs in zip(copies, sent, received, strict=True):
        if ours != theirs:
            raise WeightSyncError(
                f"{engine_rank}: {copy.tensor!r} rows {copy.start}:{copy.stop} differ from the "
                f"trainer's after the sync (checksum {theirs:#x}, should be {ours:#x})"
            )
