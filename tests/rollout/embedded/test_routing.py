"""The experts an engine says it chose are those that transformers' routers choose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miles_lite.algo.routing import RouterSizes, choices
from miles_lite.parallel import EngineDims
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.types import NO_ROUTING, Completion, Finish, Request
from tests.forced import chosen
from tests.rollout.embedded.helpers import (
    GREEDY,
    SAMPLED,
    StartRank,
    Tiny,
    build,
    drain,
    random_prompt,
    run,
)
from tests.rollout.embedded.ranks import Pool

WANTED = replace(SAMPLED, wants_routing=True)

# more than there are slots, of very different lengths; of two a prompt is shared
REQUESTS = [
    Request(uid, random_prompt(length, uid), replace(WANTED, seed=uid, max_new_tokens=1 + uid))
    for uid, length in enumerate((40, 1, 3, 17, 8, 30, 2, 25, 5))
]
REQUESTS += [
    Request(20 + i, REQUESTS[3].tokens, replace(WANTED, seed=20 + i, max_new_tokens=9))
    for i in range(3)
]


def assert_routing(tiny: Tiny, requests: Sequence[Request], done: Mapping[int, Completion]) -> None:
    sizes = RouterSizes.of(tiny.model)
    for request in requests:
        tokens = request.tokens + done[request.uid].tokens
        assert sizes.shape_fault(done[request.uid].routing, len(tokens)) == ""
        got = np.sort(choices(done[request.uid].routing), -1)
        assert np.array_equal(got, np.sort(chosen(tiny.oracle, tokens), -1)), request.uid


def test_one_rank(tiny: Tiny, start: StartRank) -> None:
    done = run(start(max_running=4, prefill_tokens=64), REQUESTS)
    assert_routing(tiny, REQUESTS, done)
    lone = done[1]  # a prompt of one token, of which two answers were drawn
    assert lone.routing.shape == (2, 2, 3) and lone.routing.item_bytes == 1


def test_many_experts_take_two_bytes(tmp_path: Path, start: StartRank) -> None:
    many = build(tmp_path, n_routed_experts=300, moe_intermediate_size=4)
    done = run(start(many), REQUESTS[:4])
    assert_routing(many, REQUESTS[:4], done)
    routing = done[0].routing
    assert routing.item_bytes == 2 and len(routing.experts) == 40 * 2 * 3 * 2
    assert choices(routing).max() > 255


def test_only_those_who_want_it_get_it(tiny: Tiny, start: StartRank) -> None:
    """Beside each other in one batch, of one prompt."""
    plain = replace(REQUESTS[3], uid=50, sampling=replace(GREEDY, max_new_tokens=5))
    done = run(start(max_running=16), [plain, *REQUESTS[:4]])
    assert done[50].routing == NO_ROUTING
    assert_routing(tiny, REQUESTS[:4], done)


def test_without_wish_nothing_is_noted(start: StartRank) -> None:
    rank = start()
    rank.server._to_host = None  # pyright: ignore: would be called to note something
    assert run(rank, [Request(0, (1, 2), GREEDY)])[0].routing == NO_ROUTING


def test_aborted_requests_bring_what_there_is(start: StartRank) -> None:
    rank = start(max_running=1, max_seq_len=100_000)
    endless = replace(WANTED, max_new_tokens=90_000)
    rank.submit([Request(uid, (uid, 3), endless) for uid in range(2)])
    time.sleep(0.3)
    rank.abort()
    done = drain(rank, 2)
    assert done[0].finish is Finish.abort and done[1].routing == NO_ROUTING
    assert done[0].routing.shape == (1 + len(done[0].tokens), 2, 3)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dims",
    [
        EngineDims(tp=2, dp=1, ep=2),
        EngineDims(tp=2, dp=2, ep=1),
        EngineDims(tp=2, dp=2, ep=2),
        EngineDims(tp=4, dp=2, ep=4),
    ],
    ids=str,
)
def test_every_layout(tiny: Tiny, pool: Pool, dims: EngineDims) -> None:
    """Groups of DP attention tell of their own requests, though experts see those of all."""
    options = EngineOptions(max_running=3, max_seq_len=96, prefill_tokens=64, timeout_s=20)
    pool.start(tiny.model, dims, options, tiny.folder)
    pool.call(0, "submit", REQUESTS)
    done: dict[int, Completion] = {}
    end = time.monotonic() + 60
    while len(done) < len(REQUESTS) and time.monotonic() < end:
        done.update(pool.call(0, "poll", 1.0))
    assert_routing(tiny, REQUESTS, done)
    pool.call_all("close")
