"""The client against a real HTTP server that stands in for SGLang's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

from aiohttp import web

from miles_lite.rollout.sglang.client import KEEPS_S, Client
from miles_lite.rollout.sglang.launch import SERVER_KEEPS_S


@contextlib.contextmanager
def server_that_tells_the_connection() -> Iterator[str]:
    """Its URL; every answer is the port of the client's end of the connection."""

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        return web.json_response({"connection": request.transport.get_extra_info("peername")[1]})

    loop = asyncio.new_event_loop()

    async def start() -> str:
        app = web.Application()
        app.router.add_post("/ask", answer)
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


def test_an_idle_connection_is_given_up_before_the_server_closes_it() -> None:
    assert KEEPS_S * 10 <= SERVER_KEEPS_S
    with server_that_tells_the_connection() as url:
        client = Client("engine 0", url, "")
        try:
            first, second = (client.post("/ask", {}, 10) for _ in range(2))
            time.sleep(KEEPS_S + 1)
            third = client.post("/ask", {}, 10)
        finally:
            client.close()
    assert first == second != third
