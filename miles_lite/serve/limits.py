"""What a stranger may cost the server before it is known what he asks, or whether he may."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 15.0  # for the head of a request
BODY_S = 60.0  # for all of its body
MAX_CONNECTIONS = 512


def max_body_bytes(max_seq_len: int) -> int:
    """What a prompt that fits may need, all characters escaped; and something for tools."""
    return (1 << 20) + 32 * max_seq_len


class BodyLimit:
    """A body that is too large or too slow in coming is an error of the client."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = BODY_S) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        deadline = asyncio.get_running_loop().time() + self._seconds
        told = dict(scope["headers"]).get(b"content-length", b"0")
        is_too_large, num_bytes, is_whole = int(told) > self._max_bytes, 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes now is the news that the client has gone
                return await receive()
            if is_too_large:
                raise self._too_large()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"no whole body within {self._seconds:g} s") from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a body of more than {self._max_bytes:,} bytes")


class Protocol(H11Protocol):
    """HTTP/1.1 with a limit on the time that the head of a request takes, which uvicorn waits for
    without end."""

    _timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._awaits_head and self._timer:
            self._timer.cancel()
            self._timer = None
        elif self._awaits_head and not self._timer:
            self._timer = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._awaits_head:
            self.transport.close()
