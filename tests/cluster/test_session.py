"""A Ray that is not there, or dies while it starts: told in one line, and soon."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from miles_lite.cluster import everywhere
from miles_lite.cluster.session import open_session
from miles_lite.config import ClusterConfig
from miles_lite.protocols import RunError

CONNECT_S = 2.0


def _join(address: str) -> None:
    with open_session(ClusterConfig(device="cpu", address=address), 1, "cpu"):
        raise AssertionError("there was no Ray")


def _ask(address: str) -> None:
    everywhere.on_every_host(address, time.time, deadline_s=60)


@pytest.fixture
def address() -> Iterator[str]:
    """Connections are made to it, as to a head that is stopped."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("use", [_join, _ask])
def test_who_says_nothing_is_no_ray(
    address: str, use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everywhere, "CONNECT_S", CONNECT_S)
    begin = time.monotonic()
    with pytest.raises((RunError, ConnectionError), match=rf":{address.split(':')[1]}: timed out"):
        use(address)
    assert time.monotonic() - begin < CONNECT_S + 5


@pytest.mark.timeout(60)
def test_who_speaks_something_else_is_no_ray() -> None:
    with http.server.HTTPServer(("0.0.0.0", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match="who listens there is no Ray"):
            _ask(f"127.0.0.1:{server.server_port}")
        server.shutdown()


SCRIPT = """
import threading, psutil
from miles_lite import cli
from miles_lite.cluster.session import open_session
from miles_lite.config import ClusterConfig

def kill():
    while not (found := [c for c in psutil.Process().children() if c.name() == "raylet"]):
        pass
    found[0].kill()

def run(words):
    with open_session(ClusterConfig(device="cpu"), 1, "cpu"):
        print("up")

threading.Thread(target=kill).start()
cli._check = run
raise SystemExit(cli.run(["check"]))
"""


@pytest.mark.slow
def test_a_node_that_dies_while_ray_starts_is_told_in_one_line() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert "\nmiles-lite check: Ray did not come up (local): " in f"\n{done.stderr}"
