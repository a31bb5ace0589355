"""Remote processes with names and deadlines: the only way the driver talks to ranks.

Every wait has a deadline and, when it passes, names who did not answer and to what.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_lite.cluster import roll
from miles_lite.cluster.placement import Bundle
from miles_lite.log import few
from miles_lite.protocols import Engine, EngineError, EnginesLost, RemoteError

T = TypeVar("T")

SETTLE_S = 5.0  # after a failure, for what caused it to be known
# what is left of a rank in the eyes of its neighbours: gloo's and NCCL's words
_BROKEN = re.compile(
    r"(?i)connection (closed|reset|refused)|timed out|timeout|remote process|broken pipe|"
    r"socket|nccl (error|communicator)"
)
_DETAIL = re.compile(r"Worker exit detail: (.*?\.) Some common causes")
_PID = re.compile(r"\bpid: (\d+)")


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
            # of one rank: nobody needs to be looked for
            raise RemoteError(f"{_unanswered(method, deadline_s)} from: {self.name}") from None
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

    Raises RemoteError soon after one fails (others then hang in collectives), naming the cause; or
    when the deadline passes, naming who did not arrive.
    """
    pending = {call.ref: call for call in calls}
    end = time.monotonic() + deadline_s
    results: dict[Any, Any] = {}
    with _told(pending):
        _await(pending, results, end, deadline_s)
    return [results[call.ref] for call in calls]


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


def _await(
    pending: dict[Any, Call], results: dict[Any, Any], end: float, deadline_s: float
) -> None:
    """Move all from `pending` to `results`."""
    called = [call.remote.name for call in pending.values()]
    while pending:
        left = end - time.monotonic()
        if left <= 0:
            raise _late(list(pending.values()), deadline_s, called)
        if failures := _take_ended(pending, results, left):
            settled = time.monotonic() + SETTLE_S
            while pending and not any(map(_is_death, failures)) and time.monotonic() < settled:
                failures += _take_ended(pending, results, settled - time.monotonic())
            raise _cause(failures, called)


def _take_ended(
    pending: dict[Any, Call], results: dict[Any, Any], timeout_s: float
) -> list[tuple[Call, Exception]]:
    """Wait for one to end and take all that have by then. Returns those that failed."""
    failures: list[tuple[Call, Exception]] = []
    refs = list(pending)
    ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, timeout_s))
    if ready:  # asked one by one, a thousand ranks would be looked at a million times
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
    for ref in ready:
        call = pending.pop(ref)
        try:
            results[ref] = ray.get(ref)
        except ray.exceptions.RayError as error:
            failures.append((call, error))
    return failures


def _is_death(failure: tuple[Call, Exception]) -> bool:
    return isinstance(failure[1], ray.exceptions.RayActorError)


def _cause(failures: Sequence[tuple[Call, Exception]], called: Sequence[str]) -> RemoteError:
    """A process that died, whose neighbours tell first, but only of a connection; else the first
    that has more to tell than that; else who made the others wait."""
    told = [one for one in failures if _BROKEN.search(str(one[1])) is None]
    call, error = next(filter(_is_death, failures), (told or failures)[0])
    failed = _failed(call, error)
    if told or _is_death((call, error)):
        return failed
    found = roll.call(called, f"no answer to {call.method!r}")
    return RemoteError(f"{failed}; no answer from: {found.told}") if found.told else failed


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
        runtime_env={"env_vars": {**env, **roll.environment(name)}},
    )
    return Remote(name, actor.remote(*args))


def _late(calls: Sequence[Call], deadline_s: float, called: Sequence[str]) -> RemoteError:
    """called: with those that have answered. Takes some seconds, for the roll call."""
    what = _unanswered(calls[0].method, deadline_s)
    late = few([call.remote.name for call in calls])
    return RemoteError(f"{what} from: {roll.call(called, what).told or late}")


def _unanswered(method: str, deadline_s: float) -> str:
    return f"no answer to {method!r} within {deadline_s:g} s"


def _failed(call: Call, error: Exception) -> RemoteError:
    name, method = call.remote.name, call.method
    if isinstance(error, ray.exceptions.RayActorError):
        return RemoteError(f"{name} died, asked for {method!r}: {_death(error)}")
    cause = getattr(error, "cause", None) or error
    return RemoteError(f"{name} failed in {method!r}: {cause}")


def _death(error: Exception) -> str:
    """The sentence that matters of Ray's page."""
    text = " ".join(str(error).split())
    if (found := _DETAIL.search(text)) is None:
        return text
    pid = _PID.search(text)
    where = f"process {pid.group(1)}: " if pid else ""
    return f"{where}{found.group(1)} Killed, out of memory or crashed: see dmesg of its host"
