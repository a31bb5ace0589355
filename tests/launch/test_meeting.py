"""What hosts are refused for, over real sockets; ports; what is found before a start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from miles_lite import cli
from miles_lite.cluster.network import addresses, ephemeral_range, interface_env
from miles_lite.cluster.token import proof
from miles_lite.environment import PROJECT, code_digests
from miles_lite.launch import preflight, worker
from miles_lite.launch.facts import Facts
from miles_lite.launch.head import Settings
from miles_lite.launch.ports import Ports, taken
from miles_lite.launch.preflight import (
    LaunchError,
    exposed,
    head_problems,
    worker_problems,
)
from miles_lite.launch.roster import Roster, Wanted
from miles_lite.launch.wire import LINE_BYTES, Lost, Wire

HEAD = dataclasses.replace(Facts.here("127.0.0.9"), host="head")
PORTS = Ports.of(21_000)
WELCOME = {"token": "/nowhere", "digest": "0", "paths": [], "folder": "/"}


def hello(**changes: Any) -> dict[str, Any]:
    """What another host of the same versions says; it reaches the head from 127.0.0.1."""
    facts = dataclasses.asdict(HEAD) | {"host": "other", "address": "127.0.0.1"}
    return facts | {"clock": time.time()} | changes


async def meet(
    wanted: Wanted, *messages: tuple[str, Mapping[str, Any]]
) -> tuple[list[tuple[str, dict[str, Any]]], Roster]:
    """Say so many things to a head; what it answers, until it closes or is silent for a second."""
    roster = Roster(HEAD, wanted, WELCOME, TOKEN)
    server = await asyncio.start_server(roster.serve, "127.0.0.1", 0)
    wire = Wire(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    heard = []
    try:
        for kind, values in messages:
            await wire.send(kind, **values)
        while True:
            heard.append(await wire.receive(1.0))
    except Lost:
        return heard, roster
    finally:
        await wire.close()
        server.close()


ANY = Wanted(2, (), 0, ())
TOKEN = "of-this-run"
KNOWS = {"proof": proof(TOKEN, "127.0.0.1")}


@pytest.mark.parametrize(
    ("changes", "wanted", "why"),
    [
        ({"clock": time.time() + 3600}, ANY, "s ahead of the head's, more than 5 s: set it"),
        ({"clock": 0.0}, ANY, "s behind the head's"),
        ({"python": "3.9.1"}, ANY, "it has Python 3.9.1, the head"),
        (
            {"packages": {**HEAD.packages, "ray": "2"}},
            ANY,
            "package versions: ray 2 (head",
        ),
        ({"code": {**HEAD.code, "miles_lite/train.py": "0"}}, ANY, "miles_lite/train.py; bring"),
        ({"address": "10.0.0.7"}, ANY, "calls itself 10.0.0.7 but reaches the head as 127.0.0.1"),
        ({"mood": "good"}, ANY, "it runs other code than the head"),
        ({"packages": ["ray"]}, ANY, "it runs other code than the head (packages = ['ray'] is not"),
        ({"gpus": 8}, ANY, "other code than the head (gpus = 8 is not"),
        ({"gpus": [[8]]}, ANY, "other code than the head (gpus = [8] is list"),
        ({"clock": "now"}, ANY, "other code than the head (clock = 'now' is str"),
        ({"clock": float("nan")}, ANY, "other code than the head (clock = nan is no number"),
        ({"clock": 10**400}, ANY, "other code than the head (clock is more than any"),
        ({"host": None}, ANY, "other code than the head (host = None"),
        ({"gpus": ["H200"] * 4}, Wanted(2, (), 8, ()), "it has 4 GPUs, where the layout wants 8"),
        ({}, Wanted(2, ("127.0.0.9", "127.0.0.8"), 0, ()), "none of the hosts of this run"),
    ],
)
def test_a_host_is_refused(changes: dict[str, Any], wanted: Wanted, why: str) -> None:
    heard, _ = asyncio.run(meet(wanted, ("hello", hello(**changes))))
    assert [kind for kind, _ in heard] == ["refused"]
    assert why in heard[0][1]["why"]


def test_a_host_that_agrees_is_welcome_and_one_that_is_too_many_is_not() -> None:
    heard, _ = asyncio.run(meet(ANY, ("hello", hello()), ("ready", KNOWS)))
    assert heard == [("welcome", WELCOME)]
    heard, _ = asyncio.run(meet(Wanted(1, (), 0, ()), ("hello", hello()), ("ready", KNOWS)))
    assert heard[-1] == ("refused", {"why": "all hosts are there already"})


@pytest.mark.parametrize("said", ["", proof("guessed", "127.0.0.1"), "é"])
def test_a_host_without_the_token_of_the_run_takes_nobodys_place(said: str) -> None:
    heard, roster = asyncio.run(meet(ANY, ("hello", hello()), ("ready", {"proof": said})))
    assert heard[-1] == ("refused", {"why": "it does not know the token of the run"})
    assert roster.names() == [HEAD.name]


NOISE = {
    b"GET / HTTP/1.0\r\n\r\n": "not JSON",
    b"[1]\n": "[1] is not a JSON object",
    b"\xff\xfe\n": "not JSON",
    b"{}\n": "a message of kind ''",
    b'{"kind": ["end"]}\n': "a message of kind ['end']",
    b'{"kind": "\\u001b[2J"}\n': "a message of kind '\\x1b[2J'",
    b'{"kind": "end", "why": "so"}\n': "end with code = None",
    b'{"kind": "end", "why": "so", "code": "0"}\n': "end with code = '0'",
    b'{"kind": "leaving", "why": {}}\n': "leaving with why = {}",
    b'{"kind": "go", "gcs": "a", "device": ["cpu"], "num_devices": 1}\n': "go with device = [",
    b'{"kind": "welcome", "token": "", "digest": "", "paths": [3], "folder": ""}\n': "paths = [3]",
    b"[" * 100_000 + b"\n": "not JSON",
    b'{"kind": "end", "why": ' + b"[" * 500 + b"]" * 500 + b"}\n": "more than 100 lists",
    b'{"kind": "end", "code": ' + b"9" * 5000 + b"}\n": "not JSON",
    b"x" * (LINE_BYTES + 1) + b"\n": "limit",
    b"": "closed the connection",
}


@pytest.mark.parametrize("noise", NOISE, ids=lambda noise: repr(noise[:40]))
def test_noise_is_no_message(noise: bytes) -> None:
    """To the head it is no host, and to a worker no order."""

    async def knock() -> tuple[list[str], str]:
        roster = Roster(HEAD, ANY, WELCOME, TOKEN)
        server = await asyncio.start_server(roster.serve, "127.0.0.1", 0, limit=LINE_BYTES)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(noise)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):  # closed before it was all read
            while await asyncio.wait_for(reader.read(1 << 16), 5):
                pass
        writer.close()
        server.close()
        said = asyncio.StreamReader(LINE_BYTES)
        said.feed_data(noise)
        said.feed_eof()
        order = Wire(said, writer)
        with pytest.raises(Lost) as lost:
            await order.receive(5)
        await order.close()
        return roster.names(), str(lost.value)

    names, why = asyncio.run(knock())
    assert names == [HEAD.name]
    assert NOISE[noise] in why and len(why) < 300


def test_a_connection_that_is_gone_at_once_has_no_peer() -> None:
    """Where it was reset before its turn came the socket has no names."""

    async def peer() -> tuple[str, str]:
        ours, theirs = socket.socketpair()
        theirs.close()
        wire = Wire(*await asyncio.open_connection(sock=ours))
        with pytest.raises(Lost, match="closed the connection"):
            await wire.receive(5)
        await wire.close()
        return wire.peer, wire.own

    assert asyncio.run(peer()) == ("", "")


def test_a_changed_byte_of_the_code_shows(tmp_path: Path) -> None:
    (tmp_path / "miles_lite/__pycache__").mkdir(parents=True)
    (tmp_path / "miles_lite/a.py").write_text("x = 1")
    (tmp_path / "miles_lite/__pycache__/a.pyc").write_text("any")
    before = code_digests(tmp_path)
    (tmp_path / "miles_lite/a.py").write_text("x = 2")
    assert list(before) == ["miles_lite/a.py"]
    assert code_digests(tmp_path) != before
    assert "miles_lite/launch/facts.py" in code_digests(PROJECT)


def test_ports_are_one_block_of_different_numbers() -> None:
    numbers = dataclasses.astuple(PORTS)
    assert numbers[:-1] == tuple(range(21_000, 21_011))
    assert PORTS.last_worker == 22_009
    low, _ = ephemeral_range()
    for base in (80, low - 500, low + 10):
        with pytest.raises(ValueError, match="PORT_BASE"):
            Ports.of(base)


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", PORTS.gcs)):
        (found,) = taken(PORTS)
        assert found.startswith(f"port {PORTS.gcs} is taken by process ")
        assert Path(sys.executable).name in found or "pytest" in found
        assert found in head_problems("127.0.0.1", 1, PORTS)
    assert taken(PORTS) == []


def test_wrong_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    own = next(iter(addresses()))
    monkeypatch.setattr(preflight, "RAY", ())  # somebody else's test may run one just now
    (found,) = head_problems("192.0.2.7", 2, PORTS)
    assert found.startswith("192.0.2.7 is no address of this host, which has ") and own in found
    (found,) = head_problems("127.0.0.1", 2, PORTS)
    assert "which no other host can reach" in found
    assert head_problems("127.0.0.1", 1, PORTS) == head_problems(own, 2, PORTS) == []
    assert "of this very host" in worker_problems(own, PORTS)[0]
    assert worker_problems("192.0.2.7", PORTS) == []
    with pytest.raises(LaunchError, match="'node7' is no IP address; this host has"):
        head_problems("node7", 2, PORTS)
    assert interface_env(own)["NCCL_SOCKET_IFNAME"] == f"={addresses()[own]}"
    assert interface_env("192.0.2.7") == {}


def test_an_address_of_the_internet_is_refused_unless_asked_for() -> None:
    (found,) = exposed("8.8.8.8", False)
    assert "--public" in found
    assert exposed("8.8.8.8", True) == []
    assert [exposed(ip, False) for ip in ("10.1.2.3", "192.168.0.2", "127.0.0.1", "fd00::1")] == [
        [] for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("cluster.address=auto", "launch sets cluster.address"),
        ("--nodes 3", "2 devices (parallel.tp x pp x dp) cannot be shared evenly by 3 hosts"),
        ("--hosts 10.0.0.1,10.0.0.2", "the head 127.0.0.1 is none of the hosts 10.0.0.1, 10.0.0.2"),
        ("--port 99999", "PORT_BASE"),
        ("--nodes 2", "127.0.0.1 is a loopback address"),
    ],
)
def test_a_head_that_cannot_lead(words: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", "head", "127.0.0.1", "experiment=tiny", *words.split()]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "Connect call failed.*or one of another PORT_BASE"),  # the head came back elsewhere
        (b"HTTP/1.1 400 Bad Request\r\n", "cannot be understood.*is it another program, and the"),
        (b"", "closed the connection.*is it another program, and the head one of another PORT_BA"),
    ],
)
def test_a_worker_where_no_head_is(
    answer: bytes | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "require", lambda problems: None)  # head and worker on one host

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer or b"")
        writer.close()

    async def visit() -> None:
        server = await asyncio.start_server(other, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if answer is None:
            server.close()
        settings = Settings("127.0.0.1", dataclasses.replace(PORTS, meeting=port), wait_s=0.1)
        try:
            await worker.run(settings, "")
        finally:
            server.close()

    with pytest.raises(LaunchError, match=why):
        asyncio.run(visit())
