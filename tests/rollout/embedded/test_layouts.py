"""Engines of several processes over gloo give what one process gives, and fail together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from miles_lite.parallel import EngineDims
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.types import Completion, Finish, Request
from tests.rollout.embedded.helpers import GREEDY, ONE, SAMPLED, Tiny, random_prompt, run
from tests.rollout.embedded.ranks import Pool

OPTIONS = EngineOptions(max_running=4, max_seq_len=96, prefill_tokens=64, timeout_s=20)

# of very different lengths, more than there are slots, some drawn and some greedy
REQUESTS = [
    Request(
        uid,
        random_prompt(length, uid),
        replace(SAMPLED if uid % 2 else GREEDY, seed=uid, max_new_tokens=4 + uid),
    )
    for uid, length in enumerate((40, 1, 3, 17, 8, 30, 2, 25, 5, 11, 4))
]

LAYOUTS = [
    EngineDims(tp=2, dp=1, ep=1),
    EngineDims(tp=2, dp=1, ep=2),
    EngineDims(tp=2, dp=2, ep=1),
    EngineDims(tp=2, dp=2, ep=2),
    EngineDims(tp=4, dp=1, ep=2),  # more ranks than kv heads
    EngineDims(tp=4, dp=2, ep=4),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[int, Completion]:
    rank = EngineRank(tiny.model, ONE, 0, OPTIONS)
    rank.connect("")
    rank.load_hf(tiny.folder)
    rank.set_version(0)
    rank.enter(Phase.generate)
    done = run(rank, REQUESTS)
    rank.close()
    return done


def finish(pool: Pool, requests: list[Request]) -> dict[int, Completion]:
    pool.call(0, "submit", requests)
    return collect(pool, len(requests))


def collect(pool: Pool, number: int) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    end = time.monotonic() + 60
    while len(done) < number and time.monotonic() < end:
        done.update(pool.call(0, "poll", 1.0))
    assert len(done) == number
    return done


@pytest.mark.slow
@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_every_layout_draws_the_same(
    tiny: Tiny, pool: Pool, expected: dict[int, Completion], dims: EngineDims
):
    pool.start(tiny.model, dims, OPTIONS, tiny.folder)
    for _ in range(2):  # with and without traces of earlier requests
        for uid, completion in finish(pool, REQUESTS).items():
            assert completion.tokens == expected[uid].tokens
            assert completion.logprobs == pytest.approx(expected[uid].logprobs, abs=1e-3)
    # a lone request leaves the other groups without tokens
    assert finish(pool, REQUESTS[:1])[0].tokens == expected[0].tokens
    # nor do requests that are given up while they run disturb any
    endless = replace(GREEDY, max_new_tokens=80)
    pool.call(0, "submit", [Request(uid, (uid, 5), endless) for uid in (100, 101, 102)])
    pool.call(0, "submit", REQUESTS)
    pool.call(0, "cancel", [100, 101, 102])
    for uid, completion in collect(pool, len(REQUESTS) + 3).items():
        wanted = expected[uid].finish if uid in expected else Finish.abort
        assert completion.finish is wanted
        assert uid not in expected or completion.tokens == expected[uid].tokens
    pool.call_all("enter", Phase.train)
    assert all(held["cache"] == 0 for held in pool.call_all("held_bytes"))
    pool.call_all("close")


@pytest.mark.slow
def test_abort_reaches_every_group(tiny: Tiny, pool: Pool):
    pool.start(tiny.model, EngineDims(tp=4, dp=2, ep=2), OPTIONS, tiny.folder)
    endless = replace(GREEDY, max_new_tokens=80)
    pool.call(0, "submit", [Request(uid, (uid + 1, 5), endless) for uid in range(12)])
    time.sleep(0.1)
    pool.call(0, "abort")
    done = collect(pool, 12)
    assert any(completion.finish is Finish.abort for completion in done.values())
    pool.call_all("enter", Phase.sync)
    pool.call_all("set_version", 7)
    pool.call_all("enter", Phase.generate)
    assert finish(pool, [replace(REQUESTS[1], uid=99)])[99].version == 7
    pool.call_all("close")


@pytest.mark.slow
def test_a_rank_that_fails_is_named_by_rank_0_at_once(tiny: Tiny, pool: Pool):
    pool.start(tiny.model, EngineDims(tp=4, dp=2, ep=2), OPTIONS, tiny.folder)
    pool.call(3, "sabotage")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"engine rank 3 .*ZeroDivisionError: sabotaged"):
        finish(pool, REQUESTS)
    assert time.monotonic() - start < OPTIONS.timeout_s / 2
    with pytest.raises(RuntimeError, match="engine rank 3"):
        pool.call(0, "submit", REQUESTS)
    with pytest.raises(RuntimeError, match="engine rank 3"):
        pool.call(0, "enter", Phase.train)


@pytest.mark.slow
def test_ranks_outlive_a_long_idle_time(tiny: Tiny, pool: Pool):
    options = replace(OPTIONS, timeout_s=2.0)
    pool.start(tiny.model, EngineDims(tp=2, dp=2, ep=2), options, tiny.folder)
    time.sleep(5)
    assert len(finish(pool, REQUESTS[:3])) == 3
    pool.call_all("close")
