"""A worker: waits for the head, joins, stays until the run ends, leaves with its status."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_lite.cluster.network import addresses
from miles_lite.cluster.token import proof
from miles_lite.launch.child import GRACE_S, RayNode, resources
from miles_lite.launch.facts import Facts
from miles_lite.launch.head import Settings
from miles_lite.launch.preflight import (
    LaunchError,
    common_problems,
    exposed,
    own_addresses,
    require,
    worker_problems,
)
from miles_lite.launch.wire import LINE_BYTES, SILENCE_S, Lost, Wire
from miles_lite.log import say

RETRY_S = 1.0
VISIBLE_S = 15.0  # network file systems show a new file that late
NO_HEAD = (
    ". What answers on port {} never spoke like a head: is it another program, and the head one of "
    "another PORT_BASE?"
)
NO_WAY = (errno.ENETUNREACH, errno.EADDRNOTAVAIL)  # waiting changes nothing


async def run(settings: Settings, own_address: str) -> int:
    """The status of the run. own_address: "" for the one from which the head is reached. Raises
    LaunchError, also when the head is lost."""
    problems = worker_problems(settings.address, settings.ports)
    require(problems + exposed(settings.address, settings.is_public))
    if own_address and own_address not in addresses():
        raise LaunchError(f"NODE_IP={own_address}: this host has {own_addresses()}")
    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    wire = await _reach(settings, own_address)
    try:
        return await _Visit(settings, wire).stay()
    except asyncio.CancelledError:
        await wire.send("leaving", why="was stopped there by a signal")
        raise
    except Lost as lost:
        raise LaunchError(
            f"the head {settings.address} {lost}: this worker has left; start it again once the "
            f"head runs (a head that dies is noticed within {SILENCE_S:g} s)"
            f"{'' if wire.heard else NO_HEAD.format(settings.ports.meeting)}"
        ) from None
    finally:
        await wire.close()


async def _reach(settings: Settings, own_address: str) -> Wire:
    """A connection to the head. Raises LaunchError at the deadline, saying what was tried."""
    head, port = settings.address, settings.ports.meeting
    local = (own_address, 0) if own_address else None
    deadline, told = time.monotonic() + settings.wait_s, False
    while True:
        try:
            opening = asyncio.open_connection(head, port, local_addr=local, limit=LINE_BYTES)
            return Wire(*await asyncio.wait_for(opening, 10.0))
        except (OSError, TimeoutError) as error:
            why, number = str(error) or "no answer", getattr(error, "errno", 0)
        if number in NO_WAY or time.monotonic() > deadline:
            hint = "a host answers there, but no head runs on it, or one of another PORT_BASE"
            if number != errno.ECONNREFUSED:
                hint = f"this host has {own_addresses()}: is the head in a network that it reaches?"
            raise LaunchError(
                f"no head at {head}:{port} within {settings.wait_s:g} s ({why}); {hint}"
            )
        if not told:
            print(f"launch: waiting for the head at {head}:{port} ({why})", flush=True)
            told = True
        await asyncio.sleep(RETRY_S)


class _Visit:
    """From hello to the end."""

    def __init__(self, settings: Settings, wire: Wire) -> None:
        self._settings, self._wire = settings, wire
        self._ray: RayNode | None = None
        self._token = Path()
        self._failed, self._grace_s = True, 2.0  # until the head says otherwise

    async def stay(self) -> int:
        own = self._wire.own
        require(common_problems(own, self._settings.ports))
        await self._wire.send("hello", **_plain(Facts.here(own)))
        try:
            while True:
                kind, values = await self._hear()
                if kind == "refused":
                    raise LaunchError(f"the head refuses this host: {values['why']}")
                if kind == "welcome":
                    await self._look(values)
                elif kind == "go":
                    await self._join(values)
                elif kind == "end":
                    say(f"launch: the run ended: {values['why']}")
                    self._grace_s, self._failed = GRACE_S, values["code"] != 0
                    return int(values["code"])
        finally:
            if self._ray is not None:
                await self._ray.stop(self._failed, self._grace_s)

    async def _hear(self) -> tuple[str, dict[str, Any]]:
        """The next message; a Ray that ends meanwhile is an error that the head is told."""
        hearing = asyncio.create_task(self._wire.receive())
        waiting: set[asyncio.Task[Any]] = {hearing}
        if self._ray is not None:
            waiting.add(asyncio.create_task(self._ray.child.wait()))
        try:
            await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
            if hearing.done():
                return hearing.result()
            assert self._ray is not None
            raise await self._failure(f"Ray ended there: {self._ray.last_words()}")
        finally:
            for task in waiting:
                task.cancel()

    async def _failure(self, why: str) -> LaunchError:
        await self._wire.send("leaving", why=f"left: {why}")
        return LaunchError(why)

    async def _look(self, welcome: Mapping[str, Any]) -> None:
        """Whether this host sees what the head sees."""
        why = await _unseen(welcome)
        if why:
            await self._wire.send("cannot", why=why)
            raise LaunchError(why)
        self._token = Path(welcome["token"])
        os.chdir(welcome["folder"])  # relative paths of the run are meant from there
        print(f"launch: ready, as {self._wire.own}; waiting for the other hosts", flush=True)
        await self._wire.send("ready", proof=proof(self._token.read_text(), self._wire.own))

    async def _join(self, go: Mapping[str, Any]) -> None:
        try:
            self._ray = await RayNode.start(
                self._settings.ports,
                self._wire.own,
                self._token,
                gcs=go["gcs"],
                resources=resources(go["device"], go["num_devices"]),
            )
        except LaunchError as error:
            raise await self._failure(str(error)) from None
        print("launch: joined; the run is shown on the head", flush=True)
        await self._wire.send("joined")


async def _unseen(welcome: Mapping[str, Any]) -> str:
    """What this host does not see, with the way out; "" if nothing."""
    for path in (welcome["folder"], *welcome["paths"]):
        if not Path(path).exists():
            return f"{path} of the head is not there: it must be at the same place on every host"
    token, deadline = Path(welcome["token"]), time.monotonic() + VISIBLE_S
    while not (token.is_file() and _digest(token) == welcome["digest"]):
        if time.monotonic() > deadline:
            return (
                f"what the head writes to {token.parent} cannot be seen here: log.folder must be "
                "on storage that all hosts share"
            )
        await asyncio.sleep(0.5)
    return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(facts: Facts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
