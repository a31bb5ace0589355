"""The driver's side over ranks that live in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from miles_lite.cluster.actor import RemoteError
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded import engine as engine_module
from miles_lite.rollout.embedded.engine import EmbeddedEngine, EngineError
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.layout import params
from miles_lite.types import Finish, Request
from tests.rollout.embedded.helpers import GREEDY, ONE, StartRank, Tiny, random_prompt


class LocalRank:
    """Has the call API of cluster.actor.Remote, on an object of this process."""

    def __init__(self, target: Any, name: str = "engine 0 rank 0"):
        self.name, self.handle = name, target
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.broken = False

    async def call_async(self, method: str, *args: Any, deadline_s: float) -> Any:
        self.calls.append((method, args))
        if self.broken:
            raise RemoteError(f"{self.name} failed in {method!r}: gone")
        return await asyncio.to_thread(getattr(self.handle, method), *args)

    def submissions(self) -> list[list[int]]:
        return [[r.uid for r in args[0]] for method, args in self.calls if method == "submit"]


@pytest.fixture
def engine(tiny: Tiny, start: StartRank, monkeypatch: pytest.MonkeyPatch) -> EmbeddedEngine:
    monkeypatch.setattr(engine_module, "POLL_WAIT_S", 0.5)
    rank = start(max_seq_len=4096)
    return EmbeddedEngine(
        "engine 0", lambda: [LocalRank(rank)], (tiny.model, ONE), rank.options, 30.0
    )


def batch(first: int, number: int) -> list[Request]:
    return [Request(uid, random_prompt(5, uid), GREEDY) for uid in range(first, first + number)]


async def gathered(engine: EmbeddedEngine, requests: list[Request]) -> list:
    return await asyncio.gather(*map(engine.generate, requests))


def test_a_gathered_batch_is_one_submission_in_every_event_loop(engine: EmbeddedEngine):
    for first in (0, 20, 40):
        done = asyncio.run(gathered(engine, batch(first, 12)))
        assert all(completion.finish is Finish.length for completion in done)
    assert engine.ranks[0].submissions() == [[*range(f, f + 12)] for f in (0, 20, 40)]


def test_later_requests_join_a_running_batch(engine: EmbeddedEngine):
    async def staggered() -> list:
        early = asyncio.gather(*map(engine.generate, batch(0, 3)))
        await asyncio.sleep(0.02)
        late = asyncio.gather(*map(engine.generate, batch(3, 3)))
        return [*await early, *await late]

    assert len(asyncio.run(staggered())) == 6
    assert engine.ranks[0].submissions() == [[0, 1, 2], [3, 4, 5]]


def test_one_impossible_request_does_not_harm_the_others(engine: EmbeddedEngine):
    async def mixed() -> list:
        bad = Request(9, (), GREEDY)
        calls = [*map(engine.generate, batch(0, 2)), engine.generate(bad)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, refused = asyncio.run(mixed())
    assert len(first.tokens) == len(second.tokens) == GREEDY.max_new_tokens
    assert isinstance(refused, ValueError)


def test_a_broken_rank_fails_all_pending_requests_by_name(engine: EmbeddedEngine):
    async def until_broken() -> list:
        endless = replace(GREEDY, max_new_tokens=4000)
        calls = [engine.generate(replace(r, sampling=endless)) for r in batch(0, 3)]
        pending = asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.1)
        engine.ranks[0].handle.model.weights.clear()
        return await pending

    for error in asyncio.run(until_broken()):
        assert isinstance(error, EngineError)
        assert "engine 0" in str(error) and "engine rank 0" in str(error)
    engine.ranks[0].broken = True
    with pytest.raises(EngineError, match="engine 0: engine 0 rank 0 failed in"):
        asyncio.run(engine.generate(batch(9, 1)[0]))


def test_deadline_names_the_request(engine: EmbeddedEngine):
    engine.deadline_s = 0.2
    endless = replace(batch(3, 1)[0], sampling=replace(GREEDY, max_new_tokens=4000))
    with pytest.raises(EngineError, match=r"rank 0 did not finish request 3 within 0\.2 s"):
        asyncio.run(engine.generate(endless))
    assert asyncio.run(engine.generate(batch(4, 1)[0])).finish is Finish.length  # 3 is given up
    engine.ranks[0].handle.enter(Phase.train)  # at once, hence nothing runs


def test_abort_resolves_everything(engine: EmbeddedEngine):
    async def aborted() -> list:
        endless = replace(GREEDY, max_new_tokens=4000)
        calls = [engine.generate(replace(r, sampling=endless)) for r in batch(0, 12)]
        pending = asyncio.gather(*calls)
        await asyncio.sleep(0.05)
        await engine.abort()
        return await asyncio.wait_for(pending, 1.0)

    assert {completion.finish for completion in asyncio.run(aborted())} == {Finish.abort}


def test_requests_of_a_dead_event_loop_are_given_up(engine: EmbeddedEngine):
    async def interrupted() -> None:
        endless = replace(GREEDY, max_new_tokens=4000)
        call = asyncio.create_task(engine.generate(replace(batch(0, 1)[0], sampling=endless)))
        await asyncio.sleep(0.1)
        call.cancel()

    asyncio.run(interrupted())
    done = asyncio.run(gathered(engine, batch(1, 3)))
    assert [len(completion.tokens) for completion in done] == [GREEDY.max_new_tokens] * 3


def test_layout_needs_no_call(tiny: Tiny, engine: EmbeddedEngine):
    (hosted,) = engine.layout()
    assert hosted == [h for p in params(tiny.model, ONE, 0) for h in p.hosted]
    assert engine.receivers() is engine.ranks and engine.ranks[0].calls == []
    assert engine.version == -1
    assert EngineOptions().max_seq_len > 0
