"""JSON lines between head and worker, with a beat, so that silence means something."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

BEAT_S = 2.0
SILENCE_S = 30.0  # after so much the other side counts as dead
LINE_BYTES = 1 << 20


class Lost(Exception):
    """The other side is gone. Says how that was noticed."""


class Wire:
    """One connection. Close it; until then the other side hears a beat."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._beat = asyncio.create_task(self._keep_beating())
        self.peer: str = writer.get_extra_info("peername")[0]
        self.own: str = writer.get_extra_info("sockname")[0]
        self.heard = False  # something that such a wire says, a beat at least

    async def send(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(ConnectionError):  # who receives next is told
            self._writer.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            await self._writer.drain()

    async def receive(self, silence_s: float = SILENCE_S) -> tuple[str, dict[str, Any]]:
        """The next message that is no beat. Raises Lost."""
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), silence_s)
                message = json.loads(line) if line else {}
                kind = message.pop("kind", "")
            except TimeoutError:
                raise Lost(f"was silent for {silence_s:g} s") from None
            except OSError:
                raise Lost("closed the connection") from None
            except (ValueError, AttributeError) as error:
                raise Lost(f"cannot be understood ({error})") from None
            if not kind:
                raise Lost("closed the connection")
            self.heard = True
            if kind != "beat":
                return kind, message

    async def close(self) -> None:
        self._beat.cancel()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _keep_beating(self) -> None:
        while not self._writer.is_closing():
            await asyncio.sleep(BEAT_S)
            await self.send("beat")
