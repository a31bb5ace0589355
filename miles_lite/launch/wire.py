"""JSON lines between head and worker, with a beat, so that silence means something."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from miles_lite.untrusted import parse_object, short

BEAT_S = 2.0
SILENCE_S = 30.0  # after so much the other side counts as dead
LINE_BYTES = 1 << 20
# What each message holds at least; a list is one of texts. Of hello see Facts.
MESSAGES: Mapping[str, Mapping[str, type]] = {
    "beat": {},
    "hello": {},
    "refused": {"why": str},
    "welcome": {"token": str, "digest": str, "paths": list, "folder": str},
    "cannot": {"why": str},
    "ready": {"proof": str},
    "go": {"gcs": str, "device": str, "num_devices": int},
    "joined": {},
    "leaving": {"why": str},
    "end": {"code": int, "why": str},
}


class Lost(Exception):
    """The other side is gone. Says how that was noticed."""


class Wire:
    """One connection. Close it; until then the other side hears a beat."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._beat = asyncio.create_task(self._keep_beating())
        # none of a connection that is gone again
        self.peer: str = (writer.get_extra_info("peername") or ("",))[0]
        self.own: str = (writer.get_extra_info("sockname") or ("",))[0]
        self.heard = False  # something that such a wire says, a beat at least

    async def send(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(ConnectionError):  # who receives next is told
            self._writer.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            await self._writer.drain()

    async def receive(self, silence_s: float = SILENCE_S) -> tuple[str, dict[str, Any]]:
        """The next message that is no beat, with all of its fields. Raises Lost."""
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), silence_s)
            except TimeoutError:
                raise Lost(f"was silent for {silence_s:g} s") from None
            except OSError:
                raise Lost("closed the connection") from None
            except ValueError as error:  # a line of more than LINE_BYTES
                raise Lost(f"cannot be understood ({error})") from None
            if not line:
                raise Lost("closed the connection")
            kind, message = _read(line)
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


def _read(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        message = parse_object(line, "a message")
    except ValueError as error:
        raise Lost(f"cannot be understood ({error})") from None
    kind = message.pop("kind", "")
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise Lost(f"cannot be understood (a message of kind {short(kind)})")
    for field, wanted in MESSAGES[kind].items():
        value = message.get(field)
        parts = value if isinstance(value, list) else ()
        if not isinstance(value, wanted) or not all(isinstance(part, str) for part in parts):
            raise Lost(f"cannot be understood ({kind} with {field} = {short(value)})")
    return kind, message
