"""Requests to engines and answers back, also when an engine is lost on the way.

An engine that comes back is asked again for all that it was asked since it last owed nothing, in
the same order and in one turn of the event loop, and what it had answered already is not used
twice. So its successor computes the same things together, and since rounding depends on that,
answers and log-probs are to the bit those of a call in which nothing happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from miles_lite.protocols import Engine, EngineError
from miles_lite.rollout.deal import deal
from miles_lite.types import Completion, Request

log = logging.getLogger(__name__)

TICK_S = 0.05  # between looks at whether engines are lost, slow, or idle
FEW_ORDERS = 4  # of an engine: of fewer, slowness cannot be told from one long answer

Check = Callable[[Engine, Request, Completion], None]  # raises EngineError
Revive = Callable[[Mapping[str, str]], None]  # of engines by name: why they were lost


@dataclass(slots=True, eq=False)
class _Order:
    request: Request
    answer: asyncio.Future[Completion]
    call: asyncio.Task[None] | None = None  # of the engine; None: it was not asked yet

    @property
    def under_way(self) -> bool:
        return self.call is not None and not self.call.done()


@dataclass(slots=True, eq=False)
class _Share:
    """What one engine was asked since it last owed nothing."""

    engine: Engine
    orders: list[_Order] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0  # of the latest answer


def _works(share: _Share) -> bool:
    return any(order.under_way for order in share.orders)


class Dispatch:
    """For one call of the rollout: in one event loop, with weights of one version."""

    def __init__(self, engines: Sequence[Engine], check: Check, revive: Revive | None) -> None:
        """revive: brings engines back while no other is busy; None: the first loss is raised."""
        self.unfinished: Counter[str] = Counter()  # by engine
        self._shares = [_Share(engine) for engine in engines]
        self._new: list[_Order] = []  # of this turn of the event loop, dealt out after it
        self._check, self._revive = check, revive
        self._lost: dict[str, str] = {}  # why, by engine
        self._replaced: set[str] = set()  # engines that came back: they may be slow
        self._closed = False  # engines are being brought back: nobody is to be asked

    @property
    def owing(self) -> list[Engine]:
        """Engines that may still work at something, whether or not anybody waits for it; but none
        that is lost and would not listen, and none at all once a loss ends the command."""
        living = () if self._lost and self._revive is None else self._living()
        return [s.engine for s in living if self.unfinished[s.engine.name] or _works(s)]

    async def complete(self, request: Request) -> Completion:
        """The answer of one engine. Requests of one turn of the event loop are dealt out together.
        Raises EngineError when no engine can be brought back."""
        loop = asyncio.get_running_loop()
        order = _Order(request, loop.create_future())
        if not self._new:
            loop.call_soon(self._deal)
        self._new.append(order)
        try:
            return await order.answer
        except asyncio.CancelledError:
            if order.call is not None:
                order.call.cancel()
            raise

    def _deal(self) -> None:
        orders = [order for order in self._new if not order.answer.cancelled()]
        self._new = []
        prompts = [order.request.tokens for order in orders]
        loads = [self.unfinished[share.engine.name] for share in self._shares]
        for order, taker in zip(orders, deal(prompts, [1] * len(orders), loads), strict=True):
            share = self._shares[taker]
            if not self.unfinished[share.engine.name]:
                share.orders, share.began = [], time.monotonic()
            share.orders.append(order)
            self.unfinished[share.engine.name] += 1
            if not self._closed and share.engine.name not in self._lost:
                self._ask(share, order)

    def _ask(self, share: _Share, order: _Order) -> None:
        order.call = asyncio.ensure_future(self._answer(share, order))

    async def _answer(self, share: _Share, order: _Order) -> None:
        engine = share.engine
        try:
            completion = await engine.generate(order.request)
            self._check(engine, order.request, completion)
        except EngineError as error:
            self._lose(share, str(error))
            if self._revive is None and not order.answer.done():
                order.answer.set_exception(error)
        except Exception as error:  # whoever waits shall have it
            if not order.answer.done():
                order.answer.set_exception(error)
        else:
            if not order.answer.done():
                order.answer.set_result(completion)
                self.unfinished[engine.name] -= 1
                share.ended = time.monotonic()

    def _lose(self, share: _Share, why: str) -> None:
        if share.engine.name in self._lost:
            return
        self._lost[share.engine.name] = why
        if self._revive is None:
            return
        log.warning("%s; the others finish what they have, then it is restarted", why)
        for order in share.orders:
            if order.call is not None and order.call is not asyncio.current_task():
                order.call.cancel()

    def _living(self) -> Iterator[_Share]:
        return (share for share in self._shares if share.engine.name not in self._lost)

    async def watch(self, limit: asyncio.Timeout) -> None:
        """Beside the work: bring back what is lost, on time that `limit` does not count."""
        while self._revive is not None:
            await asyncio.sleep(TICK_S)
            self._look_for_slow()
            if not self._lost or any(_works(share) for share in self._living()):
                continue
            begin, end, causes = time.monotonic(), limit.when(), dict(self._lost)
            limit.reschedule(None)
            self._closed = True
            try:
                await asyncio.to_thread(self._revive, causes)
            except Exception as error:  # whoever waits shall have it
                self._fail(error)
                return
            took = time.monotonic() - begin
            limit.reschedule(None if end is None else end + took)
            self._closed = False
            self._replaced |= causes.keys()
            self._lost.clear()
            for share in self._shares:
                again = share.engine.name in causes and self.unfinished[share.engine.name]
                for order in share.orders:
                    if order.call is None or again:
                        self._ask(share, order)

    def _look_for_slow(self) -> None:
        """An engine is replaced when half of all have been done for as long again as they took, and
        it owes more than half of its answers. Not one that stands still: it says so itself, sooner.
        Not one that came back in this call: it may be slow for reasons that stay."""
        now = time.monotonic()
        asked = [share for share in self._living() if share.orders]
        done = [share for share in asked if not self.unfinished[share.engine.name]]
        if not done or 2 * len(done) < len(asked):
            return
        took = max(share.ended - share.began for share in done)
        waited = now - max(share.ended for share in done)
        for share in asked:
            name, num = share.engine.name, len(share.orders)
            owes = self.unfinished[name]
            if num < FEW_ORDERS or 2 * owes <= num or name in self._replaced:
                continue
            if waited > max(took, 2 * share.engine.stall_s):
                self._lose(
                    share,
                    f"{name} is slow: {owes} of {num} answers are missing {waited:.0f} s after "
                    f"others were done in {took:.0f} s",
                )

    def _fail(self, error: Exception) -> None:
        for share in self._shares:
            for order in share.orders:
                if not order.answer.done():
                    order.answer.set_exception(error)

    async def close(self) -> None:
        """Nobody waits for an answer any more."""
        calls = [o.call for share in self._shares for o in share.orders if o.call is not None]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
