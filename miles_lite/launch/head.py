"""The head of a run: prepares, meets the workers, drives, tells them how it ended."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from miles_lite.claim import claim
from miles_lite.cluster.token import write_token
from miles_lite.compose import compose
from miles_lite.config import Config, ConfigError
from miles_lite.launch.child import (
    GRACE_S,
    RAY_START_S,
    RayNode,
    environment,
    resources,
)
from miles_lite.launch.facts import Facts
from miles_lite.launch.ports import Ports
from miles_lite.launch.preflight import LaunchError, exposed, head_problems, require
from miles_lite.launch.roster import Roster, Wanted
from miles_lite.launch.wire import LINE_BYTES
from miles_lite.log import say
from miles_lite.planner.hardware import Hardware
from miles_lite.supervise import DEFAULT_RESTARTS, Foreground, supervise

SET_HERE = ("cluster.address", "cluster.device")  # by us, not by an override


@dataclass(frozen=True, slots=True)
class Settings:
    """Of either command, besides the overrides."""

    address: str  # of the head
    ports: Ports
    wait_s: float  # for the other side
    num_hosts: int = 0  # 0: as many as the layout needs
    hosts: tuple[str, ...] = ()  # their addresses, where they are known beforehand
    is_public: bool = False  # the address may be one of the internet
    restarts: int = DEFAULT_RESTARTS  # of the driver, while all hosts are there


class Head:
    """One attempt at a run. `run` is its life; everything it starts has ended when it returns."""

    def __init__(self, settings: Settings, overrides: Sequence[str]) -> None:
        self._settings = settings
        for override in overrides:
            if override.partition("=")[0] in SET_HERE:
                raise ConfigError(f"{override}: launch sets {', '.join(SET_HERE)} itself")
        cfg = compose(overrides)
        self._own = Facts.here(settings.address)
        self._device = cfg.cluster.device
        if self._device == "auto":
            self._device = "cuda" if self._own.gpus else "cpu"
        self._num_hosts, self._num_devices = _shares(cfg, settings)
        self._num_gpus = self._num_devices if self._device == "cuda" else 0  # a host
        name = cfg.log.name or cfg.experiment  # a name is what lets it resume
        self._words = [*(o for o in overrides if not o.startswith("log.name=")), f"log.name={name}"]
        self._folder = (cfg.log.folder / name).absolute()
        self._token = self._folder / ".ray-token"  # who can read it belongs to this run
        self._model = cfg.model.path.absolute()

    async def run(self) -> int:
        """The status of the run. Raises LaunchError, and CancelledError when a signal ended it
        before the driver ran."""
        settings = self._settings
        problems = head_problems(settings.address, self._num_hosts, settings.ports)
        problems += exposed(settings.address, settings.is_public)
        require(problems + self._own.too_few(self._num_gpus))
        self._driver = Foreground(environment(settings.address, self._token))
        print(f"{self._num_hosts} hosts of {self._num_devices} devices; ports:")
        print("\n".join(settings.ports.lines(settings.address)), flush=True)
        for command in ("plan", "check"):
            if code := await self._driver.run(command, self._words):
                raise LaunchError(f"miles-lite {command} failed with status {code}, see above")
        self._folder.mkdir(parents=True, exist_ok=True)
        with claim(self._folder, ".head.lock"):
            return await self._lead()

    async def _lead(self) -> int:
        settings, ports = self._settings, self._settings.ports
        token = write_token(self._token)
        roster = Roster(self._own, self._wanted(), self._welcome(token), token)
        server = await asyncio.start_server(
            roster.serve, settings.address, ports.meeting, limit=LINE_BYTES
        )
        code, why, ray = 1, "the head failed", None
        try:
            ray = await RayNode.start(
                ports,
                settings.address,
                self._token,
                gcs="",
                resources=resources(self._device, self._num_devices),
            )
            await roster.wait_for_all(settings.wait_s)
            (self._folder / "hosts.json").write_text(json.dumps(roster.names()) + "\n")
            await roster.go(
                RAY_START_S, gcs=self._gcs, device=self._device, num_devices=self._num_devices
            )
            code, why = await self._drive(roster, ray)
            return code
        except LaunchError as error:
            code, why = 2, str(error)
            raise
        except asyncio.CancelledError:
            code, why = 130, "the head was stopped by a signal"
            raise
        finally:
            await roster.tell_all("end", code=code, why=why)
            server.close()
            self._token.unlink(missing_ok=True)
            if ray is not None:
                await ray.stop(keep_logs=code != 0)

    async def _drive(self, roster: Roster, ray: RayNode) -> tuple[int, str]:
        """Status of the driver, and why the run ended. A host that is lost ends it."""
        words = [*self._words, f"cluster.address={self._gcs}", f"cluster.device={self._device}"]
        ours = asyncio.create_task(ray.child.wait())
        driving = asyncio.create_task(
            supervise(
                self._folder,
                lambda: self._driver.run("train", words),
                self._settings.restarts,
                lambda: self._driver.asked or ours.done() or roster.lost.done(),
            )
        )
        try:
            await asyncio.wait({driving, ours, roster.lost}, return_when="FIRST_COMPLETED")
            lost = roster.lost.result() if roster.lost.done() else ""
            if ours.done() and not lost:
                lost = f"Ray ended on the head: {ray.last_words()}"
            if lost and not driving.done():
                say(f"launch: {lost}; ending the run")
                # the driver knows which rank it misses, and says so if it is let; without Ray here
                # it can do nothing
                grace_s = 0.0 if ours.done() else GRACE_S
                await asyncio.wait({driving}, timeout=grace_s)
                await self._driver.stop(grace_s)
            code = await driving
        finally:
            ours.cancel()
            driving.cancel()
        if code == 0:
            return 0, "it has finished"
        return code, lost or f"the driver ended with status {code}"

    # ------------------------------------------------------------------ what is told and heard

    @property
    def _gcs(self) -> str:
        return f"{self._settings.address}:{self._settings.ports.gcs}"

    def _wanted(self) -> Wanted:
        file = self._folder / "hosts.json"
        before = json.loads(file.read_text()) if file.is_file() else []
        return Wanted(self._num_hosts, self._settings.hosts, self._num_gpus, tuple(before))

    def _welcome(self, token: str) -> dict[str, object]:
        """What a worker must be able to see: also a file that was not there a second ago."""
        return {
            "token": str(self._token),
            "digest": hashlib.sha256(token.encode()).hexdigest(),
            "paths": [str(self._model)],
            "folder": os.getcwd(),
        }


def _shares(cfg: Config, settings: Settings) -> tuple[int, int]:
    """Number of hosts, and of devices on each. Raises ConfigError."""
    world = cfg.parallel.dims.world_size
    per_host = int(Hardware.named(cfg.cluster.hardware).facts.devices_per_node)
    num_hosts = len(settings.hosts) or settings.num_hosts or math.ceil(world / per_host)
    if settings.hosts and settings.address not in settings.hosts:
        raise ConfigError(
            f"the head {settings.address} is none of the hosts {', '.join(settings.hosts)}"
        )
    if world % num_hosts:
        raise ConfigError(
            f"{world} devices (parallel.tp x pp x dp) cannot be shared evenly by {num_hosts} "
            "hosts: choose NUM_NODES, or the layout, so that they can"
        )
    return num_hosts, world // num_hosts
