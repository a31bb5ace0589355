"""The client against a real HTTP server that stands in for SGLang's."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import EngineError
from miles_lite.rollout.sglang.client import KEEPS_S, Client
from miles_lite.rollout.sglang.engine import SGLangEngine
from miles_lite.rollout.sglang.launch import SERVER_KEEPS_S
from miles_lite.rollout.sglang.options import EngineSpec
from miles_lite.types import Completion, Finish, Request, Sampling
from tests.rollout.sglang.servers import MODEL


@contextlib.contextmanager
def server(answer: Callable[[web.Request], web.Response]) -> Iterator[str]:
    """Its URL; `answer` is what it says to every POST."""

    async def answered(request: web.Request) -> web.Response:
        return answer(request)

    loop = asyncio.new_event_loop()

    async def start() -> str:
        app = web.Application()
        app.router.add_post("/{path}", answered)
        runner = web.AppRunner(app, keepalive_timeout=SERVER_KEEPS_S)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    url = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def the_connection(request: web.Request) -> web.Response:
    """The port of the client's end of it."""
    assert request.transport is not None
    return web.json_response({"connection": request.transport.get_extra_info("peername")[1]})


def test_an_idle_connection_is_given_up_before_the_server_closes_it() -> None:
    assert KEEPS_S * 10 <= SERVER_KEEPS_S
    with server(the_connection) as url:
        client = Client("engine 0", url, "")
        try:
            first, second = (client.post("/ask", {}, 10) for _ in range(2))
            time.sleep(KEEPS_S + 1)
            third = client.post("/ask", {}, 10)
        finally:
            client.close()
    assert first == second != third


GOOD = {
    "output_ids": [5, 6],
    "meta_info": {
        "output_token_logprobs": [[-0.5, 5, None], [-1, 6, None]],
        "finish_reason": {"type": "length"},
        "weight_version": "3",
    },
}


def broken(*path: str, value: object) -> str:
    """GOOD with another value at that place."""
    answer = copy.deepcopy(GOOD)
    at: dict[str, Any] = answer
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(answer)


LOGPROBS = ("meta_info", "output_token_logprobs")
BROKEN = {
    "JSONDecodeError": '{"meta_in',
    "UnicodeDecodeError": b'"\xff"',
    "RecursionError": "[" * 100_000,
    "KeyError": "{}",
    "TypeError": "[]",
    "indices": '"so it is"',
    "meta_info": '{"output_ids": [1]}',
    "unpack": broken(*LOGPROBS, value=[1, 2]),
    "with log-probs of 1": broken(*LOGPROBS, value=[[-0.5, 5]]),
    "not numbers": broken(*LOGPROBS, value=[["a", 5], [-1.0, 6]]),
    "tokens or": broken("output_ids", value=[5.0, 6.0]),
    "log-prob of token 0 is None": broken(*LOGPROBS, value=[[None, 5], [-1.0, 6]]),
    "OverflowError": broken(*LOGPROBS, value=[[-(10**400), 5], [-1.0, 6]]),
    "NoneType": broken("meta_info", "finish_reason", value=None),
    "not a valid Finish": broken("meta_info", "finish_reason", value={"type": "tired"}),
    "invalid literal": broken("meta_info", "weight_version", value="default"),
}


@pytest.mark.parametrize(("why", "body"), BROKEN.items())
def test_an_engine_that_answers_garbage_is_lost(why: str, body: str | bytes) -> None:
    """Which is an EngineError, for those who restart it; not one that passes for a user's."""
    raw = body if isinstance(body, bytes) else body.encode()
    with pytest.raises(EngineError, match=f"^engine 0: .*({why})"):
        generate(raw)


def test_an_answer_is_read() -> None:
    assert generate(json.dumps(GOOD).encode()) == Completion((5, 6), (-0.5, -1), 3, Finish.length)


def generate(body: bytes) -> Completion:
    """What an engine makes of that answer of its server."""
    model, dims = NemotronH.from_folder(MODEL), EngineDims(tp=1, dp=1, ep=1)
    spec = EngineSpec(
        folder=MODEL, dims=dims, dtype="fp32", device="cpu", max_seq_len=16, max_running=1,
        prefill_tokens=16, seed=0,
    )  # fmt: skip
    engine = SGLangEngine("engine 0", lambda: [], (model, [[]]), spec, MODEL, 10)
    sampling = Sampling(0, 2, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(2,))
    with server(lambda _: web.Response(body=body, content_type="application/json")) as url:
        engine._client = Client("engine 0", url, "")
        try:
            return asyncio.run(engine.generate(Request(1, (1, 2), sampling)))
        finally:
            engine.close()
