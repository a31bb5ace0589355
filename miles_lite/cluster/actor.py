"""Remote processes with names and deadlines: the only way the driver talks to ranks.

Every wait has a deadline and, when it passes, names who did not answer and to what.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_lite.cluster.placement import Bundle
from miles_lite.log import few
from miles_lite.protocols import Engine, EngineError, EnginesLost

T = TypeVar("T")


class RemoteError(RuntimeError):
    """A rank failed, died, or did not answer in time. The message names rank and operation."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A handle on one remote object. May be sent to other processes."""

    name: str  # role and rank, for people: "trainer rank 3"
    handle: Any

    def start(self, method: str, *args: Any) -> Call:
        return Call(self, method, getattr(self.handle, method).remote(*args))

    def call(self, method: str, *args: Any, deadline_s: float) -> Any:
        """One blocking call. Raises RemoteError."""
        return gather([self.start(method, *args)], deadline_s)[0]

    async def call_async(self, method: str, *args: Any, deadline_s: float) -> Any:
        """One call from an event loop. Raises RemoteError."""
        call = self.start(method, *args)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(call.ref.future()), deadline_s)
        except TimeoutError:
            raise _late([call], deadline_s) from None
        except ray.exceptions.RayError as error:
            raise _failed(call, error) from error

    def kill(self) -> None:
        ray.kill(self.handle)


@dataclass(frozen=True, slots=True)
class Call:
    """A call under way."""

    remote: Remote
    method: str
    ref: Any

    def result(self, deadline_s: float) -> Any:
        """Wait for it. Raises RemoteError."""
        return gather([self], deadline_s)[0]


def gather(calls: Sequence[Call], deadline_s: float) -> list[Any]:
    """The results of calls made to many ranks, in order.

    Raises RemoteError as soon as one fails (the first failure is the cause: others then hang in
    collectives), or naming all that are missing when the deadline passes.
    """
    pending = {call.ref: call for call in calls}
    end = time.monotonic() + deadline_s
    with _told(pending):
        _await(pending, end, deadline_s)
    return [ray.get(call.ref) for call in calls]


_waits: list[Mapping[Any, Call]] = []  # of this process, each what it has not got yet


@contextmanager
def _told(pending: Mapping[Any, Call]) -> Iterator[None]:
    _waits.append(pending)
    try:
        yield
    finally:
        _waits.remove(pending)


def waited_for() -> str:
    """Whose answers this process waits for just now, in words; "" for nobody's. Any thread may
    ask."""
    names = [call.remote.name for pending in tuple(_waits) for call in tuple(pending.values())]
    return f"waiting for {few(names)}" if names else ""


def _await(pending: dict[Any, Call], end: float, deadline_s: float) -> None:
    while pending:
        left = end - time.monotonic()
        if left <= 0:
            raise _late(list(pending.values()), deadline_s)
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        for ref in ready:
            call = pending.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                raise _failed(call, error) from error


def call_all(remotes: Sequence[Remote], method: str, *args: Any, deadline_s: float) -> list[Any]:
    """The same call on every rank; results in rank order."""
    return gather([remote.start(method, *args) for remote in remotes], deadline_s)


def ask_each(engines: Sequence[Engine], ask: Callable[[Engine], T]) -> list[T]:
    """What each engine answers; they are asked at once. Raises EnginesLost of all that fail."""
    if not engines:
        return []
    causes: dict[str, str] = {}
    answers: list[T] = []
    with ThreadPoolExecutor(len(engines)) as pool:
        for engine, call in [(engine, pool.submit(ask, engine)) for engine in engines]:
            try:
                answers.append(call.result())
            except (EngineError, RemoteError) as error:
                causes[engine.name] = str(error)
    if causes:
        raise EnginesLost(causes)
    return answers


def spawn(
    cls: type,
    name: str,
    *args: Any,
    bundle: Bundle,
    share: float,
    threads: int,
    env: Mapping[str, str],
) -> Remote:
    """Start `cls(*args)` in its own process on one device bundle.

    share: fraction of the bundle's device, so that a trainer and an engine rank fit on one.
    threads: how many calls may run at once.
    """
    actor = ray.remote(cls).options(
        name=None,
        num_cpus=0,
        num_gpus=share if bundle.resource == "GPU" else 0,
        resources={} if bundle.resource == "GPU" else {bundle.resource: share},
        max_concurrency=threads,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=bundle.group, placement_group_bundle_index=bundle.index
        ),
        runtime_env={"env_vars": dict(env)},
    )
    return Remote(name, actor.remote(*args))


def _late(calls: Sequence[Call], deadline_s: float) -> RemoteError:
    names = ", ".join(call.remote.name for call in calls)
    return RemoteError(f"no answer to {calls[0].method!r} within {deadline_s:g} s from: {names}")


def _failed(call: Call, error: Exception) -> RemoteError:
    cause = str(getattr(error, "cause", None) or error)
    if isinstance(error, ray.exceptions.RayActorError):  # pages, with advice
        cause = " ".join(cause.partition("Some common causes")[0].split())
    return RemoteError(f"{call.remote.name} failed in {call.method!r}: {cause}")
