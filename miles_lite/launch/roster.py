"""The head's side of the meeting: who is here, who is refused, who is lost."""

from __future__ import annotations

import asyncio
import hmac
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_lite.cluster.token import proof
from miles_lite.compose import build
from miles_lite.config import ConfigError
from miles_lite.console import seconds
from miles_lite.launch.facts import Facts, differences
from miles_lite.launch.preflight import LaunchError
from miles_lite.launch.wire import Lost, Wire
from miles_lite.log import printable

NOTE_S = 30.0  # between two lines about a wait, without a terminal


@dataclass(slots=True)
class Member:
    facts: Facts
    wire: Wire
    joined: bool = False  # its Ray is up


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which hosts the run waits for."""

    num_hosts: int  # the head is one of them
    addresses: tuple[str, ...]  # all of them, or () if any will do
    num_gpus: int  # each has at least so many
    before: tuple[str, ...]  # names of an earlier attempt


class Roster:
    """Serves workers in the background of the head's event loop."""

    def __init__(self, own: Facts, wanted: Wanted, welcome: Mapping[str, Any], token: str) -> None:
        self._own, self._wanted, self._welcome, self._token = own, wanted, welcome, token
        self._members: dict[str, Member] = {}  # by address
        self._started = False  # from then on nobody may be lost
        self._changed = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One worker, from hello to its end."""
        wire, member = Wire(reader, writer), None
        try:
            member = await self._admit(wire)
            while member is not None:
                kind, values = await wire.receive()
                if kind == "leaving":
                    raise Lost(values["why"])
                member.joined |= kind == "joined"
                self._changed.set()
        except Lost as lost:
            if member is not None:
                self._lose(member, str(lost))
        finally:
            await wire.close()

    async def _admit(self, wire: Wire) -> Member | None:
        kind, values = await wire.receive()
        received = time.time()
        if kind != "hello":
            return None
        try:
            facts = build(Facts, values, "")
        except ConfigError as error:
            told = f"it runs other code than the head ({str(error)[:200]})"
            await self._refuse(wire, wire.peer, [told])
            return None
        if problems := self._problems(facts, wire.peer, received):
            await self._refuse(wire, facts.name, problems)
            return None
        await wire.send("welcome", **self._welcome)
        kind, values = await wire.receive()
        if kind != "ready":
            _say(f"{facts.name} cannot join: {values.get('why', kind)}")
            return None
        right = proof(self._token, facts.address).encode()
        if not hmac.compare_digest(values["proof"].encode(errors="replace"), right):
            await self._refuse(wire, facts.name, ["it does not know the token of the run"])
            return None
        if facts.address in self._members or self._started or not self._missing():
            await self._refuse(wire, facts.name, ["all hosts are there already"])
            return None
        member = self._members[facts.address] = Member(facts, wire)
        self._changed.set()
        return member

    def _problems(self, facts: Facts, peer: str, received: float) -> list[str]:
        wanted = self._wanted
        found = differences(self._own, facts, received) + facts.too_few(wanted.num_gpus)
        if facts.address != peer:
            found.append(
                f"it calls itself {facts.address} but reaches the head as {peer}: Ray needs "
                "addresses that are the same on both sides, so no NAT between the hosts"
            )
        if wanted.addresses and facts.address not in wanted.addresses:
            found.append(f"it is none of the hosts of this run: {', '.join(wanted.addresses)}")
        if facts.address in self._members:
            found.append("it has joined already: another worker runs there")
        return found

    async def _refuse(self, wire: Wire, name: str, problems: Sequence[str]) -> None:
        why = "; ".join(problems)
        _say(f"refused {name}: {why}")
        await wire.send("refused", why=why)

    def _lose(self, member: Member, why: str) -> None:
        del self._members[member.facts.address]
        sentence = f"lost {member.facts.name}: it {why}"
        if not self._started:
            _say(f"{sentence}; it may come again")
        elif not self.lost.done():
            self.lost.set_result(sentence)
        self._changed.set()

    # ------------------------------------------------------------------ waiting

    async def wait_for_all(self, deadline_s: float) -> None:
        """Until every host is ready. Raises LaunchError naming who is not."""
        await self._wait(lambda: not self._missing(), "hosts", deadline_s)

    async def go(self, deadline_s: float, **values: Any) -> None:
        """Have all start their Ray and wait for that. Raises LaunchError naming who did not."""
        self._started = True
        await self.tell_all("go", **values)
        await self._wait(lambda: not self._joining(), "their Ray", deadline_s)

    async def tell_all(self, kind: str, **values: Any) -> None:
        for member in list(self._members.values()):
            await member.wire.send(kind, **values)

    def names(self) -> list[str]:
        return [self._own.name, *(member.facts.name for member in self._members.values())]

    def _missing(self) -> list[str]:
        here = {self._own.address, *self._members}
        wanted = self._wanted
        if wanted.addresses:
            return [address for address in wanted.addresses if address not in here]
        number = wanted.num_hosts - len(here)
        before = [name for name in wanted.before if name not in self.names()]
        hint = f" (last time there was {', '.join(before)})" if before else ""
        return [f"{number} of {wanted.num_hosts} hosts{hint}"] if number > 0 else []

    def _joining(self) -> list[str]:
        return [member.facts.name for member in self._members.values() if not member.joined]

    async def _wait(self, done: Callable[[], bool], what: str, deadline_s: float) -> None:
        begin = time.monotonic()
        line = _LiveLine()
        try:
            while not (self.lost.done() or done()):
                waited = time.monotonic() - begin
                missing = "missing: " + ", ".join(self._missing() or self._joining())
                here = f"here: {', '.join(self.names())}"
                if waited >= deadline_s:
                    raise LaunchError(
                        f"waited {seconds(deadline_s)} for {what}; {missing}; {here}. Start the "
                        "worker there (does it reach this address?), then this command again"
                    )
                line.show(
                    f"waiting for {what}",
                    f"{seconds(waited)} of {seconds(deadline_s)}",
                    f"{missing}; {here}",
                )
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), 1.0)
                except TimeoutError:
                    pass  # the line's clock goes on
            if self.lost.done():
                raise LaunchError(self.lost.result())
        finally:
            line.close()


class _LiveLine:
    """One line that changes, in a terminal; else a line when its text does, or half a minute on."""

    def __init__(self) -> None:
        self._live, self._text, self._next = sys.stdout.isatty(), "", 0.0

    def show(self, title: str, clock: str, text: str) -> None:
        if self._live:
            line = f"{title}, {clock}; {text}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{printable(line)}", end="", flush=True)
        elif text != self._text or time.monotonic() >= self._next:
            _say(f"{title}, {clock}; {text}")
            self._text, self._next = text, time.monotonic() + NOTE_S

    def close(self) -> None:
        if self._live:
            print("\r\033[K", end="", flush=True)


def _say(line: str) -> None:
    start = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{start}launch: {printable(line)}", flush=True)
