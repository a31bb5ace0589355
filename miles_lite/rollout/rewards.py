"""Grade answers in processes that can be killed, so that no answer can stop or hurt the run.

    grade() -> pending -> lane thread -> worker process -> verdict -> the caller's event loop

A lane is a thread that owns one worker and talks to it over pipes, several answers at a time. The
worker answers one by one; silence for longer than the time limit, or a closed pipe, is therefore
the fault of the first answer without a verdict: it becomes invalid, and the rest go back to the
head of the queue. Nothing here runs while nothing is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_lite.rollout.reward_check import check_reward_fires, preflight
from miles_lite.rollout.reward_worker import load_reward
from miles_lite.types import Verdict

__all__ = ["RewardLimits", "RewardWorkers", "check_reward_fires", "load_reward", "preflight"]

MAX_BATCH = 64  # answers on their way to one worker
START_S = 120.0  # for a worker to import the reward file
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from miles_lite.rollout.reward_worker import main; main(sys.argv[2])"
)


@dataclass(frozen=True, slots=True)
class RewardLimits:
    """What one answer may cost."""

    timeout_s: float = 10.0  # wall time of one grade, the first imports of a worker included
    memory_bytes: int = 4 << 30  # address space of a worker; 0 means no limit
    response_len: int = 1_000_000  # characters; a longer response is invalid, never cut
    cache_len: int = 65_536  # valid verdicts remembered; 0 for rewards that may change their mind


@dataclass(frozen=True, slots=True)
class _Item:
    """One answer that waits for its verdict."""

    wire: bytes  # JSON of [response, label]
    key: bytes  # digest of `wire`
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Verdict]


class _Lost(Exception):
    """A worker no longer answers; the reason is the verdict on the answer it had in hand."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RewardWorkers:
    """A reward function in `num_workers` processes.

    grade() may be awaited from any event loop, and from one after another. Invalid verdicts have
    reason "timeout", "crash" (the worker died: memory, signal, exit), "error: <exception>",
    "too_long", "not_finite", "bad_type", or the reason a reward function gave itself.
    """

    def __init__(
        self,
        file: Path,
        function: str,
        num_workers: int = 2,
        limits: RewardLimits | None = None,
    ) -> None:
        """Waits until all workers are ready. Raises ValueError as `load_reward` does."""
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        self.name = function
        self.limits = limits or RewardLimits()
        if self.limits.timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {self.limits.timeout_s}")
        self._settings = {
            "file": str(Path(file).resolve()),
            "function": function,
            "parent": os.getpid(),
            "memory_bytes": self.limits.memory_bytes,
        }
        self._pending: deque[_Item] = deque()
        self._wake = threading.Condition()  # guards _pending, _closed, _cache
        self._closed = False
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._workers: list[_Worker | None] = [None] * num_workers
        started: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lanes = [
            threading.Thread(
                target=self._run_lane, args=(i, started), daemon=True, name=f"reward-{i}"
            )
            for i in range(num_workers)
        ]
        for lane in self._lanes:
            lane.start()
        errors = [error for error in (started.get() for _ in self._lanes) if error]
        if errors:
            self.close()
            raise ValueError(errors[0])

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        return [worker.process.pid for worker in list(self._workers) if worker is not None]

    async def grade(self, response: str, label: str | int | float | None) -> Verdict:
        """The verdict on one answer; waits for a free worker. Raises RuntimeError once closed."""
        if not isinstance(response, str) or not isinstance(label, str | int | float | None):
            kinds = f"{type(response).__name__} and {type(label).__name__}"
            raise TypeError(f"response and label must be str and str, int or float, not {kinds}")
        if len(response) > self.limits.response_len:
            return Verdict(0.0, "too_long")
        wire = json.dumps([response, label]).encode()
        key = hashlib.blake2b(wire, digest_size=16).digest()
        loop = asyncio.get_running_loop()
        with self._wake:
            if self._closed:
                raise RuntimeError(f"the workers of reward {self.name} are closed")
            if (verdict := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return verdict
            future: asyncio.Future[Verdict] = loop.create_future()
            self._pending.append(_Item(wire, key, loop, future))
            self._wake.notify()
        return await future

    def close(self) -> None:
        """Kill the workers; grades still awaited raise RuntimeError. May be called twice."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in list(self._workers):
            if worker is not None:
                worker.kill()  # its lane sees a closed pipe
        for lane in self._lanes:
            lane.join()
        error = RuntimeError(f"the workers of reward {self.name} were closed before a verdict")
        _settle([(item, error) for item in self._pending])
        self._pending.clear()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_lane(self, index: int, started: queue.SimpleQueue[str]) -> None:
        """A lane's life. Its worker must be started here: it dies with this thread."""
        try:
            self._workers[index] = _Worker(self._settings)
            started.put("")
        except (ValueError, OSError) as error:
            started.put(str(error) or repr(error))
            return
        while batch := self._take():
            self._grade_batch(index, batch)
        if (worker := self._workers[index]) is not None:
            worker.bury()

    def _take(self) -> list[_Item]:
        """Wait for a fair share of what is pending; empty means closed."""
        with self._wake:
            while not self._pending and not self._closed:
                self._wake.wait()
            if self._closed:
                return []
            share = -(-len(self._pending) // len(self._lanes))
            return [self._pending.popleft() for _ in range(min(share, MAX_BATCH))]

    def _put_back(self, items: Sequence[_Item]) -> None:
        with self._wake:
            self._pending.extendleft(reversed(items))
            self._wake.notify_all()

    def _grade_batch(self, index: int, batch: list[_Item]) -> None:
        """Settle a batch; if the worker is lost, up to that answer, and put back the rest."""
        batch = [item for item in batch if not item.future.cancelled()]
        if not batch:
            return
        num_done = 0
        try:
            worker = self._living_worker(index)
            for verdicts in worker.grade([item.wire for item in batch], self.limits.timeout_s):
                self._resolve(batch[num_done : num_done + len(verdicts)], verdicts)
                num_done += len(verdicts)
        except _Lost as lost:
            if (worker := self._workers[index]) is not None:
                worker.bury()
            self._workers[index] = None
            if self._closed:
                self._put_back(batch[num_done:])
                return
            self._resolve(batch[num_done : num_done + 1], [Verdict(0.0, lost.reason)])
            self._put_back(batch[num_done + 1 :])

    def _living_worker(self, index: int) -> _Worker:
        """The lane's worker, a new one if it died. Raises _Lost if none can be started."""
        worker = self._workers[index]
        if worker is not None:
            if worker.process.poll() is None:
                return worker
            worker.bury()
        try:
            worker = _Worker(self._settings)
        except (ValueError, OSError) as error:
            raise _Lost("crash") from error
        self._workers[index] = worker
        if self._closed:  # close() may have missed it
            worker.kill()
        return worker

    def _resolve(self, items: Sequence[_Item], verdicts: Sequence[Verdict]) -> None:
        """Remember the verdicts and hand them to their callers."""
        with self._wake:
            for item, verdict in zip(items, verdicts, strict=True):
                if verdict.valid:  # a failure may have been bad luck
                    self._cache[item.key] = verdict
            while len(self._cache) > self.limits.cache_len:
                self._cache.popitem(last=False)
        _settle(list(zip(items, verdicts, strict=True)))


def _settle(outcomes: Sequence[tuple[_Item, Verdict | Exception]]) -> None:
    """Hand outcomes to the event loops that wait for them; a loop that is gone waits no more."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, Verdict | Exception]]] = defaultdict(
        list
    )
    for item, outcome in outcomes:
        by_loop[item.loop].append((item.future, outcome))
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_outcomes, settled)
        except RuntimeError:  # closed
            continue


def _set_outcomes(settled: list[tuple[asyncio.Future[Verdict], Verdict | Exception]]) -> None:
    for future, outcome in settled:
        if future.done():  # cancelled
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class _Worker:
    """One worker process, as the lane that started it sees it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Returns when it is ready. Raises ValueError if it cannot load the reward."""
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | one_thread,
            start_new_session=True,  # Ctrl-C is the driver's; and killing it kills what it started
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._unread = b""
        try:
            (error,) = next(self._lines(START_S))
        except _Lost as lost:
            self.bury()
            raise ValueError(f"a worker of reward {settings['function']}: {lost.reason}") from lost
        if error:
            self.bury()
            raise ValueError(error)

    def grade(self, wires: Sequence[bytes], timeout_s: float) -> Iterator[list[Verdict]]:
        """Verdicts in order, in pieces as they come. Raises _Lost for the first one missing."""
        self._send(b"[" + b",".join(wires) + b"]\n", timeout_s)
        num_missing = len(wires)
        for answers in self._lines(timeout_s):
            num_missing -= len(answers)
            if num_missing < 0:  # something else wrote to its pipe
                raise _Lost("crash")
            yield [Verdict(reward, reason) for reward, reason in answers]
            if not num_missing:
                return

    def kill(self) -> None:
        """Kill it and what it started, at once. Any thread may call this."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def bury(self) -> None:
        """Kill it and give back its pipes and its place in the process table."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, data: bytes, timeout_s: float) -> None:
        """Write all of it; the worker reads a whole batch before it grades."""
        rest = memoryview(data)
        deadline = time.monotonic() + timeout_s
        while rest:
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                if not _wait(self._requests, select.POLLOUT, deadline):
                    raise _Lost("timeout") from None
            except OSError as error:
                raise _Lost("crash") from error

    def _lines(self, timeout_s: float) -> Iterator[list[Any]]:
        """What the worker says, parsed, in pieces of whole lines, at most `timeout_s` apart."""
        while True:
            if not _wait(self._answers, select.POLLIN, time.monotonic() + timeout_s):
                raise _Lost("timeout")
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise _Lost("crash")
            lines, newline, self._unread = (self._unread + data).rpartition(b"\n")
            if newline:
                try:
                    yield json.loads(b"[" + lines.replace(b"\n", b",") + b"]")
                except ValueError as error:
                    raise _Lost("crash") from error


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    """Whether a pipe became ready (or broke) by the deadline."""
    poller = select.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
