"""What an engine rank's actor and the SGLang process of that rank say to each other, as JSON.

No pickles: the socket is a file that only its owner may open, each connection must know the key,
and what comes through it is data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from miles_lite.protocols import Bucket, Form
from miles_lite.weights.plan import Copy, Place, Route


@dataclass(frozen=True, slots=True)
class Address:
    """Where an actor listens for the SGLang process of its rank."""

    path: str  # of a unix socket
    key: bytes  # of its HMAC handshake

    def __str__(self) -> str:
        return f"{self.path}#{self.key.hex()}"

    @classmethod
    def parse(cls, text: str) -> Address:
        path, _, key = text.rpartition("#")
        return cls(path, bytes.fromhex(key))


@dataclass(frozen=True, slots=True)
class Message:
    """From actor to SGLang process; each is answered by one JSON object, {"error": ...} if it
    could not be done.

    start    name, dtype, shapes, padded, routes: what will come
    load     source, number, handle, num_bytes: a bucket lies there
    finish   all was sent; answered by checksums of the live weights by source
    goodbye  the sync is over
    """

    verb: str
    body: dict[str, Any]

    def encode(self) -> bytes:
        return json.dumps({"verb": self.verb, **self.body}).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Message:
        body = json.loads(raw)
        return cls(body.pop("verb"), body)

    def bucket(self) -> Bucket:
        return Bucket(tuple(self.body["handle"]), self.body["num_bytes"])


def write_route(route: Route) -> dict[str, Any]:
    """The receiver's half of a route."""
    buckets = [[_write_copy(copy) for copy in bucket] for bucket in route.buckets]
    return {"source": route.source, "target": route.target, "buckets": buckets}


def read_route(raw: dict[str, Any]) -> Route:
    buckets = tuple(tuple(map(_read_copy, bucket)) for bucket in raw["buckets"])
    return Route(raw["source"], raw["target"], buckets)


def _write_copy(copy: Copy) -> list[Any]:
    to = copy.target
    place = [to.param, to.index, to.dim, to.offset]
    return [copy.tensor, copy.start, copy.stop, copy.num_bytes, copy.form.value, copy.fp32, place]


def _read_copy(raw: list[Any]) -> Copy:
    tensor, start, stop, num_bytes, form, fp32, place = raw
    elsewhere = Place("", -1, 0, 0)  # where the sender has it is the sender's business
    return Copy(tensor, start, stop, num_bytes, Form(form), fp32, elsewhere, Place(*place))
