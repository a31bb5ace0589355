"""Who sends which slice to whom: derived once from what every rank hosts.

An engine rank receives exactly the rows it hosts, from one trainer rank each, preferably the one on
its own device. The plan is the same on every process that derives it. On a thousand ranks it has
millions of copies, so these are tuples, which are made and pickled many times faster than frozen
dataclasses.
"""

from __future__ import annotations

import functools
import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from miles_lite.protocols import Form, Hosted
from miles_lite.weights.table import HfTensor, iter_segments


class Place(NamedTuple):
    """Rows of one rank's tensor: `count` along `dim` from `offset` (after taking `index`)."""

    param: str
    index: int  # in a stacked parameter; -1 for none
    dim: int
    offset: int


class Copy(NamedTuple):
    """Rows [start, stop) of an HF tensor, from one trainer rank's place to one engine rank's."""

    tensor: str
    start: int
    stop: int
    num_bytes: int  # on the wire
    form: Form  # applied before it travels, so that the wire has what the target keeps
    fp32: bool  # on the wire; else the model's dtype
    source: Place
    target: Place


@dataclass(frozen=True, slots=True)
class Route:
    """All copies from one trainer rank to one engine rank, in sending order, cut into buckets."""

    source: int  # trainer rank
    target: int  # engine rank, counted over all engines
    buckets: tuple[tuple[Copy, ...], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """By columns: a fifth of the time that as many tuples take."""
        *columns, sources, targets = zip(*self.copies, strict=True)
        places = [list(zip(*places, strict=True)) for places in (sources, targets)]
        return _route, (self.source, self.target, list(map(len, self.buckets)), columns, places)

    @property
    def copies(self) -> list[Copy]:
        return [copy for bucket in self.buckets for copy in bucket]

    @property
    def num_bytes(self) -> int:
        return sum(copy.num_bytes for bucket in self.buckets for copy in bucket)


def _route(
    source: int, target: int, lengths: list[int], columns: list[Any], places: list[list[Any]]
) -> Route:
    ends = [map(Place._make, zip(*each, strict=True)) for each in places]
    copies = map(Copy._make, zip(*columns, *ends, strict=True))
    return Route(source, target, tuple(tuple(islice(copies, length)) for length in lengths))


class _Held(NamedTuple):
    """Rows [start, stop) of an HF tensor as one trainer rank holds them."""

    start: int
    stop: int
    rank: int
    place: Place


@contextmanager
def _uncollected() -> Iterator[None]:
    """Looking for cycles among millions of tuples, of which none is in one, takes a third of the
    time that making them does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def sync_plan(
    tensors: Mapping[str, HfTensor],
    sources: Sequence[Sequence[Hosted]],
    targets: Sequence[Sequence[Hosted]],
    home: Sequence[int],
    element_bytes: int,
    bucket_bytes: int,
) -> list[Route]:
    """Routes that fill every row of every target once.

    sources[r]: what trainer rank r hosts; targets[e]: what engine rank e hosts; home[e]: the
    trainer rank on engine rank e's device. element_bytes: of the model's dtype. No bucket exceeds
    bucket_bytes unless a single row does. Raises ValueError naming rows that nobody hosts.
    """
    held: dict[str, list[_Held]] = defaultdict(list)
    for rank, hosted_list in enumerate(sources):
        for hosted in hosted_list:
            for name, start, offset, count in iter_segments(hosted):
                place = Place(hosted.param, hosted.index, hosted.dim, offset)
                held[name].append(_Held(start, start + count, rank, place))
    load = [0] * len(sources)

    @functools.cache
    def holders(name: str, row: int) -> dict[int, _Held]:
        return {h.rank: h for h in held[name] if h.start <= row < h.stop}

    copies: dict[tuple[int, int], list[Copy]] = defaultdict(list)
    for target, hosted_list in enumerate(targets):
        for hosted in hosted_list:
            for name, start, offset, count in iter_segments(hosted):
                tensor = tensors.get(name)
                if tensor is None:
                    raise ValueError(f"engine rank {target} hosts {name!r}, unknown to the model")
                fp32 = hosted.form is Form.decay or (hosted.form is Form.stored and tensor.fp32)
                width = 4 if fp32 else element_bytes
                row_bytes = width * tensor.numel // tensor.shape[hosted.dim]
                max_rows = max(1, bucket_bytes // row_bytes)
                row, stop = start, start + count
                while row < stop:
                    source = _choose(holders(name, row), home[target], load)
                    if source is None:
                        raise ValueError(
                            f"no trainer rank hosts row {row} of {name!r}, "
                            f"which engine rank {target} needs for {hosted.param!r}"
                        )
                    end = min(stop, source.stop, row + max_rows)
                    copy = Copy(
                        name,
                        row,
                        end,
                        (end - row) * row_bytes,
                        hosted.form,
                        fp32,
                        _shifted(source.place, row - source.start),
                        Place(hosted.param, hosted.index, hosted.dim, offset + row - start),
                    )
                    copies[source.rank, target].append(copy)
                    load[source.rank] += copy.num_bytes
                    row = end
    return [
        Route(source, target, _buckets(route, bucket_bytes))
        for (source, target), route in sorted(copies.items())
    ]


def _choose(by_rank: Mapping[int, _Held], home: int, load: Sequence[int]) -> _Held | None:
    """The one on the same device, else the one that has least to send; of equals the first."""
    if not by_rank:
        return None
    return by_rank.get(home) or by_rank[min(by_rank, key=load.__getitem__)]


def _shifted(place: Place, rows: int) -> Place:
    return place._replace(offset=place.offset + rows) if rows else place


def _buckets(copies: Sequence[Copy], bucket_bytes: int) -> tuple[tuple[Copy, ...], ...]:
    """Consecutive copies, in order, up to bucket_bytes each (8-byte aligned, see transport)."""
    buckets: list[list[Copy]] = []
    filled = bucket_bytes
    for copy in copies:
        size = aligned(copy.num_bytes)
        if filled + size > bucket_bytes or not buckets:
            buckets.append([])
            filled = 0
        buckets[-1].append(copy)
        filled += size
    return tuple(map(tuple, buckets))


def aligned(num_bytes: int) -> int:
    """Room a slice takes in a bucket: every slice starts on 8 bytes, so any dtype can view it."""
    return -(-num_bytes // 8) * 8
