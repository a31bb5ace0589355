"""An embedded engine as the driver sees it: futures on this side, rank processes on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_lite.cluster.actor import Remote, call_all
from miles_lite.cluster.lease import total_bytes
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import EngineError, Hosted, Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.layout import params
from miles_lite.types import Completion, Request, Sampling

POLL_WAIT_S = 5.0  # a poll that finds nothing returns after this long, and is repeated
PING_S = 2.0  # for a rank to show that it is there, once another one failed


class EmbeddedEngine:
    """Implements protocols.Engine over the connected ranks of one engine, rank 0 first.

    Requests of the same turn of the event loop reach rank 0 as one submission, so a gathered batch
    is scheduled the same way every time.
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[], Sequence[Remote]],
        layout: tuple[NemotronH, EngineDims],
        options: EngineOptions,
        deadline_s: float,
    ):
        """spawn: starts all ranks. deadline_s: for one completion."""
        self.name, self.options, self.deadline_s = name, options, deadline_s
        self._spawn, self.ranks = spawn, spawn()
        self.model, self.dims = layout
        self.version = -1
        self.stall_s = options.stall_s
        self._max_wait_s = min(POLL_WAIT_S, self.stall_s / 4)  # of a poll
        self._start: tuple[Sequence[str], float] = ((), 0.0)  # hosts and deadline of `connect`
        self._loop: asyncio.AbstractEventLoop | None = None
        self._futures: dict[int, asyncio.Future[Completion]] = {}
        self._unsent: list[Request] = []
        self._sender: asyncio.Task[None] | None = None
        self._poller: asyncio.Task[None] | None = None
        self._unanswered: set[int] = set()  # uids submitted to rank 0; outlives an event loop
        self._has_strays = False  # some of them belong to an event loop that is gone

    async def generate(self, request: Request) -> Completion:
        """One completion. ValueError if the request can never be served, else EngineError."""
        self.options.check(request, self.model)
        self._adopt_loop()
        if request.uid in self._futures:
            raise ValueError(f"{self.name}: request uid {request.uid} is already under way")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._futures[request.uid] = future
        self._unsent.append(request)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        try:
            return await asyncio.wait_for(future, self.deadline_s)
        except TimeoutError:
            raise EngineError(
                f"{self.name}: {self.ranks[0].name} did not finish request {request.uid} within "
                f"{self.deadline_s:g} s"
            ) from None
        finally:
            self._futures.pop(request.uid, None)

    def can_score(self, sampling: Sampling) -> bool:
        return True

    async def abort(self) -> None:
        """End all unfinished requests and wait until they have resolved."""
        self._adopt_loop()
        if self._sender is not None:
            await self._sender  # abort ends what was submitted before it, so let it be
        waiting = list(self._futures.values())
        if self._unanswered:
            await self._call("abort")
        if waiting:
            await asyncio.wait(waiting, timeout=self.deadline_s)

    def connect(self, hosts: Sequence[str], deadline_s: float) -> None:
        """Let the ranks meet on rank 0's host; they serve from then on. hosts: of each rank."""
        self._start = hosts, deadline_s
        address = self.ranks[0].call("listen", hosts[0], deadline_s=deadline_s)
        call_all(self.ranks, "connect", address, deadline_s=deadline_s)

    def restart(self) -> None:
        self.close()
        self.ranks, self.version = self._spawn(), -1
        self._loop, self._unanswered = None, set()  # forget what the old ones were asked
        self.connect(*self._start)

    def close(self) -> None:
        """End the rank processes; nothing of theirs is worth a goodbye."""
        for rank in self.ranks:
            rank.kill()

    def enter(self, phase: Phase) -> Mapping[str, int]:
        return total_bytes(call_all(self.ranks, "enter", phase, deadline_s=self.stall_s))

    def held_bytes(self) -> Mapping[str, int]:
        return total_bytes(call_all(self.ranks, "held_bytes", deadline_s=self.stall_s))

    def layout(self) -> Sequence[Sequence[Hosted]]:
        return [
            [hosted for param in params(self.model, self.dims, rank) for hosted in param.hosted]
            for rank in range(self.dims.tp)
        ]

    def receivers(self) -> Sequence[Any]:
        return self.ranks

    def begin_sync(self, version: int) -> None:
        """Nothing to tell: the ranks take buckets at any time."""

    def load_hf(self, folder: Path) -> None:
        """Serve the weights of an HF folder, as version 0; instead of a sync."""
        call_all(self.ranks, "load_hf", folder, deadline_s=self.deadline_s)
        self.commit(0)

    def commit(self, version: int) -> None:
        call_all(self.ranks, "set_version", version, deadline_s=self.stall_s)
        self.version = version

    def _adopt_loop(self) -> None:
        """Every asyncio.run has its own event loop; what hung on the last one is given up."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        self._has_strays = bool(self._unanswered)
        self._loop, self._sender, self._poller = loop, None, None
        self._futures, self._unsent = {}, []

    async def _send(self) -> None:
        """Submit all requests of this turn of the event loop, and see that someone polls."""
        await asyncio.sleep(0)
        self._sender, batch, self._unsent = None, self._unsent, []
        asked = {r.uid: self._futures[r.uid] for r in batch if r.uid in self._futures}
        try:
            if self._has_strays:
                await self._call("abort")
                self._has_strays = False
            self._unanswered.update(request.uid for request in batch)
            await self._call("submit", batch)
        except Exception as error:
            await self._fail(asked, error)
            return
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(self._futures))

    async def _poll(self, futures: dict[int, asyncio.Future[Completion]]) -> None:
        """Resolve futures as completions arrive, until none is left."""
        loop = asyncio.get_running_loop()
        num_steps, moved_at = -1, loop.time()
        while futures:
            try:
                done = await self._call("poll", self._max_wait_s)
                steps = num_steps if done else await self._call("num_steps")
                quiet_s = loop.time() - moved_at
                if done or steps != num_steps:
                    num_steps, moved_at = steps, loop.time()
                elif quiet_s > self.stall_s:
                    raise EngineError(
                        f"no step for {quiet_s:.1f} s (rollout.engine.stall_s = "
                        f"{self.stall_s:g}) with {len(futures)} requests under way"
                    )
            except Exception as error:
                await self._fail(futures, error)
                return
            for uid, completion in done:
                self._unanswered.discard(uid)
                future = futures.pop(uid, None)  # None: given up by its caller
                if future is not None and not future.done():
                    future.set_result(completion)

    async def _call(self, method: str, *args: Any) -> Any:
        deadline_s = self.stall_s + self._max_wait_s
        return await self.ranks[0].call_async(method, *args, deadline_s=deadline_s)

    async def _fail(
        self, futures: Mapping[int, asyncio.Future[Completion]], error: Exception
    ) -> None:
        """Naming, besides, the ranks that are not there any more: they are why another failed."""
        pings = [rank.call_async("num_steps", deadline_s=PING_S) for rank in self.ranks]
        answers = await asyncio.gather(*pings, return_exceptions=True)
        gone = [r.name for r, a in zip(self.ranks, answers, strict=True) if not isinstance(a, int)]
        silent = f"; no sign of life from {', '.join(gone)}" if gone else ""
        for future in list(futures.values()):
            if not future.done():
                failure = EngineError(f"{self.name}: {error}{silent}")
                failure.__cause__ = error
                future.set_exception(failure)
