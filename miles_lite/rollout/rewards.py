"""Grade answers in processes that can be killed, so that no answer can stop or hurt the run.

    grade() -> pending -> lane thread -> worker process -> verdict -> the caller's event loop

A lane is a thread that owns one worker and talks to it over pipes, several answers at a time. The
worker answers one by one; silence for longer than the time limit, or a closed pipe, is therefore
the fault of the first answer without a verdict: it becomes invalid, and the rest go back to the
head of the queue. An answer that takes a while is set aside: it keeps that worker for itself, and
the lane goes on with another one, so that nobody waits behind it. Nothing runs while nothing is
asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_lite.config import RewardFunction
from miles_lite.rollout.reward_process import Lost, Worker
from miles_lite.types import Prompt, Verdict

MAX_BATCH = 64  # answers on their way to one worker
PATIENCE_S = 1.0  # then an answer is set aside
# Answers set aside at once, each with a process of its own. With many more of them, on a machine
# that is busy, new workers import sympy for so long that sound answers run out of time.
MAX_ASIDE = 16


@dataclass(frozen=True, slots=True)
class RewardLimits:
    """What one answer may cost."""

    timeout_s: float = 10.0  # wall time of one grade, the first imports of a worker included
    memory_bytes: int = 4 << 30  # address space of a worker; 0 means no limit
    response_len: int = 1_000_000  # characters; a longer response is invalid, never cut
    cache_len: int = 65_536  # valid verdicts remembered; 0 for rewards that may change their mind


@dataclass(frozen=True, slots=True)
class _Item:
    """A question that waits for its verdicts: one answer, or the answers of a group."""

    wire: bytes  # JSON of [name, responses, label, extras]
    key: bytes  # digest of `wire`
    num_responses: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Verdict]]

    def failed(self, reason: str) -> list[Verdict]:
        return [Verdict(0.0, reason)] * self.num_responses


class RewardWorkers:
    """Reward functions by name, all of them in each of `num_workers` processes.

    grade() may be awaited from any event loop, and from one after another. Invalid verdicts have
    reason "timeout", "crash" (the worker died: memory, signal, exit), "error: <exception>",
    "too_long", "not_finite", "bad_type", "bad_count: <n>" (of a group's results), or the reason a
    reward function gave itself.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        num_workers: int = 2,
        limits: RewardLimits | None = None,
    ) -> None:
        """Waits until all workers are ready. Raises ValueError as `load_reward` does."""
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        self.limits = limits or RewardLimits()
        if self.limits.timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {self.limits.timeout_s}")
        self._functions = dict(functions)
        self._settings = {
            "functions": {
                name: [str(f.file.resolve()), f.function, f.options]
                for name, f in functions.items()
            },
            "parent": os.getpid(),
            "memory_bytes": self.limits.memory_bytes,
        }
        self._pending: deque[_Item] = deque()
        self._wake = threading.Condition()  # guards _pending, _closed, _cache, _aside
        self._closed = False
        self._cache: OrderedDict[bytes, list[Verdict]] = OrderedDict()
        self._workers: list[Worker | None] = [None] * num_workers
        self._aside: dict[Worker, threading.Thread] = {}  # with an answer that takes a while
        started: queue.SimpleQueue[dict | str] = queue.SimpleQueue()
        self._lanes = [
            threading.Thread(
                target=self._run_lane, args=(i, started), daemon=True, name=f"reward-{i}"
            )
            for i in range(num_workers)
        ]
        for lane in self._lanes:
            lane.start()
        answers = [started.get() for _ in self._lanes]
        errors = [answer for answer in answers if isinstance(answer, str)]
        if errors:
            self.close()
            raise ValueError(errors[0])
        self._about: dict[str, tuple[bool, list[str]]] = answers[0]  # pyright: ignore

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        return [worker.process.pid for worker in self._living()]

    def _living(self) -> list[Worker]:
        with self._wake:
            return [w for w in (*self._workers, *self._aside) if w is not None]

    def scores_groups(self, name: str) -> bool:
        """Whether a reward wants all answers of a group at once."""
        return self._about_one(name)[0]

    def function(self, name: str) -> str:
        """The function behind a reward's name, for messages."""
        return self._functions[name].function

    def _about_one(self, name: str) -> tuple[bool, list[str]]:
        if name not in self._about:
            known = ", ".join(sorted(known or "the run's own, ''" for known in self._about))
            raise ValueError(f"no reward {name!r} among reward.others; there are {known}")
        return self._about[name]

    async def grade(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on one answer; waits for a free worker. Raises RuntimeError once closed."""
        assert not self.scores_groups(prompt.reward), f"{prompt.reward} scores whole groups"
        return (await self._ask(prompt, [response]))[0]

    async def grade_group(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """The verdicts on all answers of a group: at once, or one by one, as the reward wants."""
        if self.scores_groups(prompt.reward):
            return await self._ask(prompt, list(responses))
        return await asyncio.gather(*(self.grade(prompt, response) for response in responses))

    async def _ask(self, prompt: Prompt, responses: list[str]) -> list[Verdict]:
        if max(map(len, responses)) > self.limits.response_len:
            return [Verdict(0.0, "too_long")] * len(responses)
        values = {"prompt": prompt.text, "metadata": prompt.metadata}
        extras = {name: values[name] for name in self._about_one(prompt.reward)[1]}
        wire = json.dumps([prompt.reward, responses, prompt.label, extras]).encode()
        key = hashlib.blake2b(wire, digest_size=16).digest()
        loop = asyncio.get_running_loop()
        with self._wake:
            if self._closed:
                raise RuntimeError("the reward workers are closed")
            if (verdicts := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return verdicts
            future: asyncio.Future[list[Verdict]] = loop.create_future()
            self._pending.append(_Item(wire, key, len(responses), loop, future))
            self._wake.notify()
        return await future

    def close(self) -> None:
        """Kill the workers; grades still awaited raise RuntimeError. May be called twice."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._living():
            worker.kill()  # its thread sees a closed pipe
        for thread in (*self._lanes, *list(self._aside.values())):
            thread.join()
        error = RuntimeError("the reward workers were closed before a verdict")
        _settle([(item, error) for item in self._pending])
        self._pending.clear()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_lane(self, index: int, started: queue.SimpleQueue[dict | str]) -> None:
        """A lane's life. Its worker must be started here: it dies with this thread."""
        try:
            worker = self._workers[index] = Worker(self._settings)
            started.put(worker.about)
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
        """Settle a batch; if the worker is lost or an answer takes a while, up to that answer, and
        put back the rest."""
        batch = [item for item in batch if not item.future.cancelled()]
        if not batch:
            return
        num_done = 0
        patience = min(PATIENCE_S, self.limits.timeout_s)
        try:
            worker = self._living_worker(index)
            worker.send([item.wire for item in batch], self.limits.timeout_s)
            for verdicts in worker.verdicts(len(batch), patience):
                self._resolve(batch[num_done : num_done + len(verdicts)], verdicts)
                num_done += len(verdicts)
        except Lost as lost:
            worker, self._workers[index] = self._workers[index], None
            if self._closed:
                if worker is not None:
                    worker.bury()
                self._put_back(batch[num_done:])
                return
            self._put_back(batch[num_done + 1 :])
            item = batch[num_done]
            if lost.reason == "timeout" and worker is not None and patience < self.limits.timeout_s:
                self._set_aside(worker, item, self.limits.timeout_s - patience)
                return
            if worker is not None:
                worker.bury()
            self._resolve([item], [item.failed(lost.reason)])

    def _set_aside(self, worker: Worker, item: _Item, timeout_s: float) -> None:
        """Let the answer that a worker has in hand take its time, without the lane if possible."""
        thread = threading.Thread(
            target=self._wait_out, args=(worker, item, timeout_s), daemon=True, name="reward-slow"
        )
        with self._wake:
            beside = len(self._aside) < MAX_ASIDE
            self._aside[worker] = thread if beside else threading.current_thread()
            if beside:
                thread.start()
        if not beside:
            self._wait_out(worker, item, timeout_s)

    def _wait_out(self, worker: Worker, item: _Item, timeout_s: float) -> None:
        try:
            verdicts = next(worker.verdicts(MAX_BATCH, timeout_s))[0]
        except Lost as lost:
            verdicts = item.failed(lost.reason)
        worker.bury()  # it goes on with answers that others were given
        with self._wake:
            del self._aside[worker]
        if self._closed:
            self._put_back([item])
        else:
            self._resolve([item], [verdicts])

    def _living_worker(self, index: int) -> Worker:
        """The lane's worker, a new one if it died. Raises Lost if none can be started."""
        worker = self._workers[index]
        if worker is not None:
            if worker.process.poll() is None:
                return worker
            worker.bury()
        try:
            worker = Worker(self._settings)
        except (ValueError, OSError) as error:
            raise Lost("crash") from error
        self._workers[index] = worker
        if self._closed:  # close() may have missed it
            worker.kill()
        return worker

    def _resolve(self, items: Sequence[_Item], verdicts: Sequence[list[Verdict]]) -> None:
        """Remember the verdicts and hand them to their callers."""
        with self._wake:
            for item, found in zip(items, verdicts, strict=True):
                if all(verdict.valid for verdict in found):  # a failure may have been bad luck
                    self._cache[item.key] = found
            while len(self._cache) > self.limits.cache_len:
                self._cache.popitem(last=False)
        _settle(list(zip(items, verdicts, strict=True)))


def _settle(outcomes: Sequence[tuple[_Item, list[Verdict] | Exception]]) -> None:
    """Hand outcomes to the event loops that wait for them; a loop that is gone waits no more."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, Any]]] = defaultdict(list)
    for item, outcome in outcomes:
        by_loop[item.loop].append((item.future, outcome))
    for loop, settled in by_loop.items():
        with contextlib.suppress(RuntimeError):  # closed
            loop.call_soon_threadsafe(_set_outcomes, settled)


def _set_outcomes(
    settled: list[tuple[asyncio.Future[list[Verdict]], list[Verdict] | Exception]],
) -> None:
    for future, outcome in settled:
        if future.done():  # cancelled
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
