"""The trainer's half of a weight sync on one rank: pack, relay, hand over.

An engine rank can read the memory of a trainer rank of its own host (on a GPU: of its own device).
What it needs from another one is relayed: the owner sends the bucket to the trainer rank beside the
engine rank, through the trainer's own process group (gloo or NCCL, whatever joins the ranks in
training), and that rank hands it over. So no engine is in a process group with a trainer, which
NCCL would refuse for two processes of one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from miles_lite.cluster.actor import RemoteError
from miles_lite.protocols import Bucket
from miles_lite.weights.plan import Route
from miles_lite.weights.transport import Slots, bucket_bytes, pack, source_checksums


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one rank sent. checksums[target] are in plan order of the route to that engine rank."""

    checksums: dict[int, list[int]]
    num_bytes: int
    relayed_bytes: int  # of them, those that went through another trainer rank
    seconds: float
    lost: Mapping[int, str]  # engine ranks that did not take a bucket, and why


@dataclass(frozen=True, slots=True)
class Itinerary:
    """A route, and which trainer rank hands its buckets over: the source or a relay."""

    route: Route
    last: int

    @property
    def relayed(self) -> bool:
        return self.last != self.route.source


def itineraries(
    routes: Sequence[Route], reach: Sequence[str], home: Sequence[int]
) -> list[Itinerary]:
    """reach[r]: of trainer rank r, what must be equal to share memory: its host, or its device.
    home[e]: the trainer rank on engine rank e's device, which can always."""

    def last(route: Route) -> int:
        beside = home[route.target]
        return route.source if reach[route.source] == reach[beside] else beside

    return [Itinerary(route, last(route)) for route in routes]


class Sender:
    """Two slots: one is packed, or received into, while the other is read."""

    def __init__(
        self,
        rank: int,
        tensors: Callable[[str], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """tensors: the live storage of a parameter by name. dtype: of the model."""
        self._rank, self._tensors, self._dtype, self._device = rank, tensors, dtype, device
        self._own: list[Itinerary] = []
        self._relayed: list[Itinerary] = []
        self._receivers: Sequence[Any] = ()
        self._slots: Slots | None = None

    def prepare(self, mine: Sequence[Itinerary], receivers: Sequence[Any]) -> None:
        """Once: the itineraries that start or pass here, and remote handles of all engine ranks."""
        self._own = [way for way in mine if not way.relayed]
        self._relayed = [way for way in mine if way.relayed]
        self._receivers = receivers
        sizes = [bucket_bytes(bucket) for way in mine for bucket in way.route.buckets]
        if self._slots is not None:
            self._slots.close()
        self._slots = Slots(max(sizes), self._device) if sizes else None

    def send(self, timeout_s: float) -> SyncReport:
        """Returns when all that starts or passes here has been read. All ranks call it at once.

        timeout_s: of one bucket. An engine rank that does not take one gets no more; all else goes
        its way, as other trainer ranks wait for what is relayed here.
        """
        begin = time.perf_counter()
        lost: dict[int, str] = {}
        pending: list[tuple[int, Any] | None] = [None, None]  # target and call that reads each slot

        def settle(which: int) -> None:
            if (reader := pending[which]) is not None and reader[0] not in lost:
                try:
                    reader[1].result(timeout_s)
                except RemoteError as error:
                    lost[reader[0]] = str(error)
            pending[which] = None

        for turn, (way, number) in enumerate(self._jobs()):
            which = turn % 2
            settle(which)
            num_bytes = self._fill(which, way, number)
            target = way.route.target
            if self._rank == way.last and target not in lost:
                call = self._hand_over(which, way.route, number, num_bytes)
                pending[which] = (target, call)
        settle(0)
        settle(1)
        sent = [way for way in (*self._own, *self._relayed) if way.route.source == self._rank]
        checksums = {
            way.route.target: source_checksums(self._tensors, way.route.copies, self._dtype)
            for way in sent
        }
        return SyncReport(
            checksums,
            sum(way.route.num_bytes for way in sent),
            sum(way.route.num_bytes for way in sent if way.relayed),
            time.perf_counter() - begin,
            lost,
        )

    def _jobs(self) -> Iterator[tuple[Itinerary, int]]:
        """Every bucket that starts or passes here.

        Own deliveries first; their targets are visited in turns that start after this rank, so
        that senders do not all queue at one receiver. Relays follow in an order that is the same
        on all ranks, so that no two wait for each other.
        """
        for way in sorted(self._own, key=lambda w: (w.route.target < self._rank, w.route.target)):
            yield from ((way, number) for number in range(len(way.route.buckets)))
        world = dist.get_world_size() if self._relayed else 1
        relayed = [
            (number, (way.last - way.route.source) % world, way.route.source, way.route.target, way)
            for way in self._relayed
            for number in range(len(way.route.buckets))
        ]
        yield from ((way, number) for number, *_, way in sorted(relayed, key=lambda job: job[:4]))

    def _fill(self, which: int, way: Itinerary, number: int) -> int:
        """The bucket into a slot: packed here, or received. Sends it on if this is not its last
        stop. Returns its bytes."""
        assert self._slots is not None, "prepare makes slots for what it is given"
        copies = way.route.buckets[number]
        slot = self._slots.slots[which]
        if way.route.source != self._rank:
            num_bytes = bucket_bytes(copies)
            dist.recv(slot[:num_bytes], way.route.source)
            return num_bytes
        num_bytes = pack(self._tensors, copies, self._dtype, slot)
        if way.relayed:
            dist.send(slot[:num_bytes], way.last)
        return num_bytes

    def _hand_over(self, which: int, route: Route, number: int, num_bytes: int) -> Any:
        assert self._slots is not None
        if self._device.type == "cuda":  # the reader knows nothing of our streams
            torch.cuda.current_stream().synchronize()
        bucket = Bucket(self._slots.handles[which], num_bytes)
        return self._receivers[route.target].start("load_bucket", route.source, number, bucket)
