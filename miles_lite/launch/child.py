"""Processes that are ours, each below a `guard`: they die with us and end by process id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles_lite.cluster import CPU_DEVICE
from miles_lite.cluster.network import interface_env, is_loopback
from miles_lite.cluster.token import TOKEN, token_env
from miles_lite.launch.ports import Ports
from miles_lite.launch.preflight import LaunchError
from miles_lite.launch.wire import SILENCE_S

GRACE_S = 20.0  # between asking a process to end and killing it
RAY_START_S = 180.0  # until Ray of one host is up
LOG_LINES = 15


class Child:
    """In a process group of its own: Ctrl-C in a terminal reaches us alone, and we pass it on."""

    def __init__(self, name: str, guard: asyncio.subprocess.Process) -> None:
        self.name, self._guard = name, guard

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], env: Mapping[str, str], log: Path | None = None
    ) -> Child:
        """log: takes all output."""
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(log.open("ab"))
            guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "miles_lite.launch.guard", *command),
                env=env,
                stdin=asyncio.subprocess.PIPE,  # closes when we die
                stdout=output,
                stderr=output,
                process_group=0,
            )
        return cls(name, guard)

    async def wait(self) -> int:
        """Its exit status; 128 + N if signal N ended it."""
        return await self._guard.wait()

    @property
    def code(self) -> int | None:
        return self._guard.returncode

    def signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._guard.send_signal(signum)

    def kill(self) -> None:
        """It and all that it started, at once."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Ask it to end, and kill it when it has not after so long. Nothing of it is left."""
        if self.code is None:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), grace_s)
        self.kill()
        await self.wait()


def environment(address: str, token: Path) -> dict[str, str]:
    """Of Ray and the driver on the host of `address`. token: file with what proves, to every Ray
    process, that another one is of this run; without it Ray would run anybody's code."""
    env = interface_env(address) | os.environ
    for name in ("RAY_ADDRESS", *TOKEN):  # of another cluster
        env.pop(name, None)
    if is_loopback(address):  # then Ray, too, stays there, as cluster.session explains
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # how long Ray looks for a head (GCS) that it lost; a minute by default
    env.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(int(SILENCE_S)))
    return env | token_env(token)


class RayNode:
    """Ray of this host, with a folder of its own for sockets and logs."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child, self._folder = child, folder

    @classmethod
    async def start(
        cls, ports: Ports, address: str, token: Path, *, gcs: str, resources: Sequence[str]
    ) -> RayNode:
        """gcs: host:port of the cluster to join, "" to be its head. Raises LaunchError."""
        folder = Path(tempfile.mkdtemp(prefix="miles-ray-"))
        command = _ray_command(ports, address, gcs, [*resources, f"--temp-dir={folder}"])
        child = await Child.start("Ray", command, environment(address, token), folder / "start.log")
        node = cls(child, folder)
        try:
            await node._wait_up(address, ports)
        except BaseException:
            await node.stop(keep_logs=True)
            raise
        return node

    async def _wait_up(self, address: str, ports: Ports) -> None:
        deadline = time.monotonic() + RAY_START_S
        while b"Ray runtime started" not in (self._folder / "start.log").read_bytes():
            if self.child.code is not None:
                raise LaunchError(f"Ray did not start on {address}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"Ray did not start on {address} within {RAY_START_S:g} s: {self.last_words()}"
                )
            await asyncio.sleep(0.2)

    def last_words(self) -> str:
        lines = (self._folder / "start.log").read_text(errors="replace").splitlines()
        return "\n  ".join([f"{self._folder} has its logs, which end:", *lines[-LOG_LINES:]])

    async def stop(self, keep_logs: bool, grace_s: float = GRACE_S) -> None:
        await self.child.stop(grace_s)
        if keep_logs:
            print(f"launch: Ray's logs stay in {self._folder}", flush=True)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def resources(device: str, num_devices: int) -> list[str]:
    """What Ray of a host is told to have: no more devices than the run uses there."""
    if device == "cuda":
        return [f"--num-gpus={num_devices}"]
    return ["--num-gpus=0", f'--resources={{"{CPU_DEVICE}": {num_devices}}}']


def _ray_command(ports: Ports, address: str, gcs: str, more: Sequence[str]) -> list[str]:
    head = [
        "--head",
        f"--port={ports.gcs}",
        f"--ray-client-server-port={ports.ray_client}",
        f"--dashboard-port={ports.dashboard}",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=false",
        "--disable-usage-stats",
    ]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *([f"--address={gcs}"] if gcs else head),
        f"--node-ip-address={address}",
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--runtime-env-agent-port={ports.runtime_env_agent}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--dashboard-agent-listen-port={ports.agent_http}",
        f"--metrics-export-port={ports.metrics}",
        f"--min-worker-port={ports.first_worker}",
        f"--max-worker-port={ports.last_worker}",
        "--log-style=record",
        "--log-color=false",
        *more,
    ]
