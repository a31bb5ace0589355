"""Moving buckets of weights between processes that can share memory.

A trainer rank packs slices into shared memory, the engine rank copies them out into its live
parameters. Two slots per sender bound the memory; a slot is used again once its reader is done.
What must come from further away, `sender` brings near first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from miles_lite.protocols import Bucket, Form, RunError
from miles_lite.weights.checksum import checksum
from miles_lite.weights.plan import Copy, Place, Route, aligned


class WeightSyncError(RunError):
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
    """A sender's two pieces of memory that another process maps by their `handles`.

    On a CPU they are anonymous files: they need no room in /dev/shm, and are gone with the last
    process that maps them, however it ended. On a GPU they are device memory that CUDA lends to a
    process of the same device (not run on a GPU).
    """

    def __init__(self, slot_bytes: int, device: torch.device) -> None:
        self._files: list[int] = []
        self.slots: list[torch.Tensor] = []
        self.handles: list[tuple[Any, ...]] = []  # of strings and numbers, so that JSON can have it
        for _ in range(2):
            if device.type == "cuda":
                slot = torch.empty(slot_bytes, dtype=torch.uint8, device=device)
                handle = _lend_cuda(slot)
            else:
                self._files.append(os.memfd_create("miles-lite-sync"))
                os.ftruncate(self._files[-1], slot_bytes)
                handle = (f"/proc/{os.getpid()}/fd/{self._files[-1]}", slot_bytes)
                slot = open_slot(handle)
            self.slots.append(slot)
            self.handles.append(handle)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self.slots.clear()


def open_slot(handle: Sequence[Any]) -> torch.Tensor:
    """The bytes of a slot, in this process."""
    if handle[0] == _CUDA:
        return _borrow_cuda(handle)
    path, num_bytes = handle
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


_CUDA = "cuda"


def _lend_cuda(slot: torch.Tensor) -> tuple[Any, ...]:
    """torch's own description of device memory for another process, bytes as hex: what its
    multiprocessing sends too. Should be right because `_borrow_cuda` is its documented inverse; the
    device number is left out, as both processes see their one device under numbers of their own."""
    _, *rest = slot.untyped_storage()._share_cuda_()
    return (_CUDA, *(part.hex() if isinstance(part, bytes) else part for part in rest))


def _borrow_cuda(handle: Sequence[Any]) -> torch.Tensor:
    _, memory, size, offset, counter, counter_offset, event, wants_sync = handle
    raw = [bytes.fromhex(part) for part in (memory, counter, event)]
    device = torch.cuda.current_device()
    storage = torch.UntypedStorage._new_shared_cuda(
        device, raw[0], size, offset, raw[1], counter_offset, raw[2], wants_sync
    )
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


def pack(
    tensors: Callable[[str], torch.Tensor],
    copies: Sequence[Copy],
    dtype: torch.dtype,
    slot: torch.Tensor,
) -> int:
    """Lay the copies into `slot` one after the other, in wire dtype; returns the bytes used."""
    offset = 0
    for copy in copies:
        rows = _to_send(tensors, copy)
        wire = torch.float32 if copy.fp32 else dtype
        room = slot[offset : offset + copy.num_bytes].view(wire).view(rows.shape)
        room.copy_(rows)
        offset += aligned(copy.num_bytes)
    return offset


def _to_send(tensors: Callable[[str], torch.Tensor], copy: Copy) -> torch.Tensor:
    rows = view(tensors, copy.source, copy.stop - copy.start)
    return -torch.exp(rows.float()) if copy.form is Form.decay else rows


def source_checksums(
    tensors: Callable[[str], torch.Tensor], copies: Sequence[Copy], dtype: torch.dtype
) -> list[int]:
    """Of what should arrive, computed from the trainer's live parameters and not from a bucket."""
    wire = {True: torch.float32, False: dtype}
    return [checksum(_to_send(tensors, copy).to(wire[copy.fp32])) for copy in copies]


class Inbox:
    """The receiving half on an engine rank.

    routes: those that end here. Buckets may come in any order, several at a time; each must come
    once, so that one lost or doubled is an error before the engine speaks.
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
        self._maps: dict[Any, torch.Tensor] = {}  # open slots by their handles
        self._due = {source: set(range(len(r.buckets))) for source, r in routes.items()}

    def load(self, source: int, number: int, bucket: Bucket) -> None:
        """Copy bucket `number` of trainer rank `source` into the live parameters."""
        if number not in self._due[source]:
            raise WeightSyncError(
                f"{self._name}: bucket {number} from trainer rank {source} came, and was not due"
            )
        if bucket.handle not in self._maps:
            self._maps[bucket.handle] = open_slot(bucket.handle)
        slot, offset = self._maps[bucket.handle], 0
        copies = self._routes[source].buckets[number]
        for copy in copies:
            rows = view(self._tensors, copy.target, copy.stop - copy.start)
            wire = torch.float32 if copy.fp32 else self._dtype
            rows.copy_(slot[offset : offset + copy.num_bytes].view(wire).view(rows.shape))
            offset += aligned(copy.num_bytes)
        if slot.is_cuda:  # the sender fills the slot again as soon as we return
            torch.cuda.current_stream().synchronize()
        if offset != bucket.num_bytes:
            raise WeightSyncError(
                f"{self._name}: bucket {number} from trainer rank {source} has {bucket.num_bytes} "
                f"bytes, the plan says {offset}: {sorted({c.tensor for c in copies})}"
            )
        self._due[source].remove(number)

    def finish(self) -> dict[int, list[int]]:
        """Check that all came; checksums of the live parameters by source rank, in plan order."""
        for source, due in self._due.items():
            buckets = self._routes[source].buckets
            if due:
                missing = buckets[min(due)][0]
                raise WeightSyncError(
                    f"{self._name}: {len(due)} of {len(buckets)} buckets from trainer rank "
                    f"{source} did not arrive, first missing {missing.tensor!r}"
                )
            due.update(range(len(buckets)))
        self._maps.clear()
        return {source: self._checksums(route.copies) for source, route in self._routes.items()}

    def _checksums(self, copies: Sequence[Copy]) -> list[int]:
        sums = []
        for copy in copies:
            rows = view(self._tensors, copy.target, copy.stop - copy.start)
            sums.append(checksum(rows.to(torch.float32 if copy.fp32 else self._dtype)))
        return sums


def compare(engine_rank: str, route: Route, sent: Sequence[int], received: Sequence[int]) -> None:
    """Raise WeightSyncError naming the first slice whose checksums differ."""
    if sent == received and len(sent) == sum(map(len, route.buckets)):
        return
    for copy, ours, theirs in zip(route.copies, sent, received, strict=True):
        if ours != theirs:
            raise WeightSyncError(
                f"{engine_rank}: {copy.tensor!r} rows {copy.start}:{copy.stop} differ from the "
                f"trainer's after the sync (checksum {theirs:#x}, should be {ours:#x})"
            )
