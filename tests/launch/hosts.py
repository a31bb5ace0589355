"""Hosts made of namespaces: each has its own network, processes, name and /dev/shm.

Their cables end in a bridge that lives in a namespace too, so nothing of the machine's own network
is touched. What a host runs dies with its first process, in whatever way the test ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from miles_lite.environment import PROJECT

# reaps what is left to it, as the first process of a host does
FIRST = """
hostname {name}
mount -t tmpfs -o size=8g tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
ip link set lo up
while :; do sleep 1000 & wait $!; done
"""


def why_not() -> str:
    """Why there can be no such hosts here; "" if there can."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return "needs Linux with ip (iproute2), unshare and nsenter"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "--ipc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"cannot make namespaces: {done.stderr.strip()}" if done.returncode else ""


@dataclass(slots=True)
class Host:
    name: str
    address: str
    first: psutil.Process
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        spaces = ("--net", "--mount", "--pid", "--uts", "--ipc")
        where = ["--target", str(self.first.pid), f"--wd={PROJECT}"]
        return ["nsenter", *where, *spaces, "--", *words]

    def start(self, log: Path, *words: str, **env: str) -> Job:
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(*words),
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/mnt", **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return Job(process, log)

    def output(self, *words: str) -> str:
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, check=True
        ).stdout

    def left(self) -> list[str]:
        """Command lines of all its processes but the first and what that waits for."""
        shown = self.output("ps", "-e", "-o", "stat=,args=").splitlines()
        lines = [line.split(None, 1)[1] for line in shown if not line.startswith("Z")]
        return [line for line in lines if not line.startswith(("bash -c", "sleep", "ps -e"))]

    def cut(self) -> None:
        """Its cable is pulled."""
        self.output("ip", "link", "set", "eth0", "down")

    def end(self) -> None:
        """Its power goes: all of its processes are killed at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.first.kill()
        for process in self.processes:
            process.wait(20)


@dataclass(frozen=True, slots=True)
class Job:
    process: subprocess.Popen[bytes]  # nsenter, which leaves with the status of what it runs
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-6000:]
            time.sleep(0.1)

    def end(self, code: int, timeout_s: float = 300) -> str:
        """Its output, once it has left with `code`."""
        try:
            found = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs:\n{self.text()[-6000:]}") from None
        assert found == code, f"status {found}:\n{self.text()[-6000:]}"
        return self.text()

    def signal(self, signum: int = signal.SIGINT) -> None:
        """To what it runs; nsenter passes nothing on."""
        (child,) = psutil.Process(self.process.pid).children()
        child.send_signal(signum)


@contextlib.contextmanager
def make_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts node1, node2, ... of 10.77.0.1, 10.77.0.2, ...; all is gone on leaving."""
    prefix = f"ml{os.getpid()}"
    hosts: list[Host] = []
    inits: list[subprocess.Popen[bytes]] = []
    try:
        _ip("netns", "add", f"{prefix}-0")
        _ip("-n", f"{prefix}-0", "link", "add", "bridge", "type", "bridge")
        _ip("-n", f"{prefix}-0", "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            space, name = f"{prefix}-{number}", f"node{number}"
            _ip("netns", "add", space)
            pair = ["link", "add", "eth0", "netns", space, "type", "veth"]
            _ip(*pair, "peer", "name", f"port{number}", "netns", f"{prefix}-0")
            _ip("-n", f"{prefix}-0", "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            spaces = [
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--uts",
                "--ipc",
            ]
            inits.append(
                subprocess.Popen(
                    [
                        *("ip", "netns", "exec", space, "unshare"),
                        *spaces,
                        "bash",
                        "-c",
                        FIRST.format(name=name),
                    ]
                )
            )
            hosts.append(Host(name, f"10.77.0.{number}", _first_of(inits[-1])))
        yield hosts
    finally:
        for host in hosts:
            host.end()
        for init in inits:
            init.kill()
            init.wait(20)
        for number in range(count + 1):
            subprocess.run(["ip", "netns", "del", f"{prefix}-{number}"], capture_output=True)


def _first_of(init: subprocess.Popen[bytes]) -> psutil.Process:
    """Process 1 of the host, once its name and its /dev/shm are its own."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process(init.pid).children(recursive=True):
            if child.name() == "sleep":
                parent = child.parent()
                assert parent is not None
                return parent
        time.sleep(0.05)
    raise AssertionError("a host did not come up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
