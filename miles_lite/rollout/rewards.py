"""Grade answers in processes that can be killed, so that no answer can stop or hurt the run.

    grade() -> pending -> lane thread -> worker process -> verdict -> the caller's event loop

A lane is a thread that owns one worker and talks to it over pipes, several answers at a time. The
worker answers one by one, so silence or a closed pipe is the fault of the first answer without a
verdict, and the rest of its batch goes back to the head of the queue. An answer that takes a while
keeps its lane and worker for itself until it is done or its time is up, and two lanes take over: so
however many are stuck, they are soon stuck side by side, and the run waits for the time limit once.
Nothing runs while nothing is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles_lite.config import RewardFunction
from miles_lite.rollout.reward_process import About, Lost, Slow, Worker, Zygote
from miles_lite.types import Prompt, Verdict

MAX_BATCH = 64  # answers on their way to one worker
PATIENCE_S = 0.1  # then an answer is slow, and others take over
MAX_SLOW = 128  # answers side by side, each with a thread and a process of its own
# Sound answers that compute for long would rob each other of their time, so there are fewer of them
# side by side unless that many verdicts in a row were quick to come: then slow ones are stuck.
MAX_SLOW_PER_CORE = 4
NUM_QUICK = 64
NUM_CORES = len(os.sched_getaffinity(0))


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
    is_retry: bool = False

    def failed(self, reason: str) -> list[Verdict]:
        return [Verdict(0.0, reason)] * self.num_responses


class RewardWorkers:
    """Reward functions by name, all of them in each of `num_workers` processes.

    grade() may be awaited from any event loop, and from one after another. Invalid verdicts have
    reason "timeout", "crash" (two workers died: memory, signal, exit), "error: <exception>",
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
        self._zygote = Zygote(
            {
                "functions": {
                    name: [str(f.file.resolve()), f.function, f.options]
                    for name, f in functions.items()
                },
                "parent": os.getpid(),
                "memory_bytes": self.limits.memory_bytes,
                "timeout_s": self.limits.timeout_s,
            }
        )
        self._about: About = self._zygote.about
        self._wake = threading.Condition()  # guards all below
        self._closed = False
        self._pending: deque[_Item] = deque()
        self._cache: OrderedDict[bytes, list[Verdict]] = OrderedDict()
        self._workers: set[Worker] = set()
        self._lanes: set[threading.Thread] = set()
        self._num_slow = 0  # lanes with an answer that takes a while
        self._num_wanted = num_workers  # lanes besides those
        self._num_quick = 0  # verdicts since the last one that was slow to come
        with self._wake:
            self._open_lanes(num_workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the zygote and of the workers alive now."""
        with self._wake:
            return [self._zygote.pid, *(worker.pid for worker in self._workers)]

    def scores_groups(self, name: str) -> bool:
        """Whether a reward wants all answers of a group at once."""
        return self._about_one(name)[0]

    def extras(self, name: str) -> Sequence[str]:
        """What a reward asks for besides response and label: "prompt", "metadata"."""
        return self._about_one(name)[1]

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
            lanes = list(self._lanes)
        self._zygote.close()  # a lane that waits for its worker sees a closed pipe
        for lane in lanes:
            lane.join()
        error = RuntimeError("the reward workers were closed before a verdict")
        _settle([(item, error) for item in self._pending])
        self._pending.clear()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_lanes(self, number: int) -> None:
        for _ in range(number):
            lane = threading.Thread(target=self._run_lane, daemon=True, name="reward-lane")
            self._lanes.add(lane)
            lane.start()

    def _run_lane(self) -> None:
        worker: Worker | None = None
        batch: list[_Item] = []
        try:
            while batch := self._take():
                worker = self._grade_batch(worker, batch)
            self._bury(worker)
        except Exception as error:  # a bug of ours: whoever waits hears of it, and does not wait on
            _settle([(item, error) for item in batch])
            raise
        finally:
            with self._wake:
                self._lanes.discard(threading.current_thread())

    def _take(self) -> list[_Item]:
        """Wait for a fair share of what is pending; empty means that this lane is over."""
        with self._wake:
            while not self._pending and not self._closed:
                if len(self._lanes) - self._num_slow > self._num_wanted:
                    self._lanes.discard(threading.current_thread())
                    return []
                self._wake.wait()
            if self._closed:
                return []
            share = -(-len(self._pending) // (len(self._lanes) - self._num_slow))
            return [self._pending.popleft() for _ in range(min(share, MAX_BATCH))]

    def _put_back(self, items: Sequence[_Item]) -> None:
        with self._wake:
            self._pending.extendleft(reversed(items))
            self._wake.notify_all()

    def _grade_batch(self, worker: Worker | None, batch: list[_Item]) -> Worker | None:
        """Settle a batch, or up to an answer that loses the worker or takes a while, and put back
        the rest. Returns the worker if it is good for another batch."""
        batch = [item for item in batch if not item.future.cancelled()]
        if not batch:
            return worker
        num_done = 0
        patience_s = min(PATIENCE_S, self.limits.timeout_s)
        try:
            if worker is None or not worker.is_fit():
                self._bury(worker)
                worker = None
                worker = self._new_worker()
            worker.send([item.wire for item in batch], self.limits.timeout_s)
            for verdicts in worker.verdicts(len(batch), patience_s):
                self._resolve(batch[num_done : num_done + len(verdicts)], verdicts)
                num_done += len(verdicts)
                self._num_quick += len(verdicts)
            return worker
        except Slow as slow:
            assert worker is not None
            self._put_back(batch[num_done + 1 :])
            self._wait_out(worker, batch[num_done], slow)
            if worker.is_fit():
                return worker
        except Lost as lost:
            item, *rest = batch[num_done:]
            self._put_back(rest)
            if not self._tried_again(item, lost.reason == "crash"):
                self._resolve([item], [item.failed(lost.reason)])
        self._bury(worker)
        return None

    def _wait_out(self, worker: Worker, item: _Item, slow: Slow) -> None:
        """Let the answer that a worker has in hand take its time while other lanes go on."""
        with self._wake:
            self._num_slow += 1
            if self._num_slow <= self._max_slow(slow.computes):
                self._open_lanes(2 if self._pending else 1)
        try:
            verdicts, reason = worker.verdict_in_hand(self.limits.timeout_s - slow.spent_s), ""
        except Lost as lost:
            verdicts, reason = item.failed(lost.reason), lost.reason
        with self._wake:
            self._num_slow -= 1
            if not reason:
                self._num_quick = 0
            was_robbed = reason == "timeout" and slow.computes and self._num_quick < NUM_QUICK
        if not self._tried_again(item, was_robbed or reason == "crash"):
            self._resolve([item], [verdicts])

    def _tried_again(self, item: _Item, innocent: bool) -> bool:
        """Once, if it may have been innocent: robbed of its time, or somebody killed its worker.
        What is put back when all is closed is never graded."""
        if not self._closed and (item.is_retry or not innocent):
            return False
        self._put_back([replace(item, is_retry=True)])
        return True

    def _max_slow(self, computes: bool) -> int:
        robbing = computes and self._num_quick < NUM_QUICK
        return MAX_SLOW_PER_CORE * NUM_CORES if robbing else MAX_SLOW

    def _new_worker(self) -> Worker:
        worker = self._zygote.fork()
        with self._wake:
            self._workers.add(worker)
        return worker

    def _bury(self, worker: Worker | None) -> None:
        if worker is None:
            return
        with self._wake:
            self._workers.discard(worker)
        worker.bury()

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
