"""HTTP to one SGLang server, from threads and event loops of any kind.

Connections live in an event loop of their own, so that they outlast the loops of those who call.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from miles_lite.protocols import EngineError

T = TypeVar("T")

# An idle connection. Long before the server closes it (SERVER_KEEPS_S): a request written at that
# very moment is reset, and nothing tells whether it was served.
KEEPS_S = 2


class Client:
    def __init__(self, name: str, url: str, api_key: str) -> None:
        self._name, self._url = name, url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._session, self._lost = self._run(self._open()).result()
        self._watch: Future[None] | None = None

    async def _open(self) -> tuple[aiohttp.ClientSession, asyncio.Future[str]]:
        # without limits of its own: deadlines are given with each call
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPS_S),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return session, self._loop.create_future()

    def watch(self, why_lost: Callable[[], str], every_s: float) -> None:
        """From now on ask why the server is lost; once that is not "", all calls end with it."""

        async def look() -> None:
            while not (reason := await asyncio.to_thread(why_lost)):
                await asyncio.sleep(every_s)
            self._lost.set_result(reason)

        self._watch = self._run(look())

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def start(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Future[Any]:
        """A call under way; its result is the parsed answer, or EngineError."""
        return self._run(self._post(path, body, deadline_s))

    def post(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Any:
        """Raises EngineError, also for an answer that says it did not succeed."""
        return self.start(path, body, deadline_s).result()

    def get(self, path: str, deadline_s: float) -> Any:
        return self._run(self._request("GET", path, None, deadline_s)).result()

    async def call(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Any:
        """From another event loop; cancelling it ends the request."""
        return await asyncio.wrap_future(self.start(path, body, deadline_s))

    async def _post(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Any:
        return await self._request("POST", path, body, deadline_s)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, deadline_s: float
    ) -> Any:
        task = asyncio.ensure_future(self._exchange(method, path, body))
        try:
            await asyncio.wait({task, self._lost}, timeout=deadline_s, return_when=FIRST_COMPLETED)
            if task.done():
                status, answer = task.result()
            elif self._lost.done():
                raise EngineError(self._lost.result())
            else:
                raise EngineError(f"{self._name}: no answer to {path} within {deadline_s:g} s")
        # the last two are of a body that is no JSON, or not the text that it says it is
        except (aiohttp.ClientError, ValueError, RecursionError) as error:
            raise EngineError(f"{self._name}: {path} failed: {error!r}") from error
        finally:
            task.cancel()
        failed = isinstance(answer, dict) and answer.get("success") is False
        if status != 200 or failed:
            raise EngineError(f"{self._name}: {path} was answered {status}: {str(answer)[:1000]}")
        return answer

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Any]:
        async with self._session.request(
            method, self._url + path, json=body, headers=self._headers
        ) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._run(self._session.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
