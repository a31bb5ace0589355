"""A function on every host of a running Ray, by a deadline that names who did not answer."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miles_lite.cluster.actor import Call, Remote, RemoteError

T = TypeVar("T")
CLOCK_READINGS = 3
CONNECT_S = 10.0
# what gRPC is spoken in: either side begins with its settings, or TLS is wanted and says so
_SETTINGS, _TLS_ALERT = b"\4", b"\x15"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0" + _SETTINGS + b"\0\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """By host; each is in exactly one of `values` and `failures`."""

    values: Mapping[str, T]
    failures: Mapping[str, str]  # why there is no value, with the host's name
    offsets: Mapping[str, tuple[float, float]]  # seconds before our clock, and how far wrong


def on_every_host(
    address: str, function: Callable[..., T], *args: Any, deadline_s: float
) -> Answers[T]:
    """function(*args) in a process of each host. Raises OSError if there is no Ray."""
    refuse_dead(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (RuntimeError, ray.exceptions.RayError) as error:  # of another version, or no answer
        raise ConnectionError(str(error)) from error
    try:
        nodes = _names([node for node in ray.nodes() if node["Alive"]])
        end = time.monotonic() + deadline_s
        calls = [_start(name, node, function, *args) for name, node in sorted(nodes.items())]
        values: dict[str, T] = {}
        failures: dict[str, str] = {}
        offsets: dict[str, tuple[float, float]] = {}
        for call in calls:
            name = call.remote.name
            try:
                values[name] = call.result(max(1.0, end - time.monotonic()))
                offsets[name] = _offset(name, nodes[name], deadline_s)
            except RemoteError as error:
                failures[name] = str(error)
        return Answers(values, failures, offsets)
    finally:
        ray.shutdown()


def refuse_dead(address: str) -> None:
    """Raise ConnectionError unless a Ray speaks there: Ray itself tries for more than five minutes,
    and for ever where somebody listens and says nothing, as a head that is stopped."""
    where = services.canonicalize_bootstrap_address(address)  # of this host it takes no loopback
    if where is None:
        return
    host, _, port = where.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
            connection.sendall(_HTTP2_HELLO)
            said = connection.recv(9)
    except OSError as error:
        raise ConnectionError(f"{where}: {error}") from error
    if said[3:4] != _SETTINGS and said[:1] != _TLS_ALERT:
        raise ConnectionError(f"{where}: who listens there is no Ray")


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Ray's id of each host by its name and address; of several at one address with the id too."""
    ids = [
        (f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["NodeID"])
        for node in nodes
    ]
    seen = Counter(name for name, _ in ids)
    return {name if seen[name] == 1 else f"{name} {node[:8]}": node for name, node in ids}


def _start(name: str, node: str, function: Callable[..., Any], *args: Any) -> Call:
    task = ray.remote(function).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return Call(Remote(name, None), function.__name__, task.remote(*args))


def _now() -> float:
    return time.time()


def _offset(name: str, node: str, deadline_s: float) -> tuple[float, float]:
    """The reading with the shortest way there and back: half of it may be wrong."""
    readings = []
    for _ in range(CLOCK_READINGS):
        begin = time.time()
        there = _start(name, node, _now).result(deadline_s)
        end = time.time()
        readings.append(((end - begin) / 2, there - (begin + end) / 2))
    error, offset = min(readings)
    return offset, error
