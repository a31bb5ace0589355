"""The reward of a service, against a real HTTP server: its answers, and every way it can fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from rewards import remote as module
from rewards.remote import remote, remote_group


class Service:
    """Replies with `reply(asked, number of the request)` -> (status, body); keeps what it saw."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.headers: list[Any] = []
        self.reply: Callable[[Any, int], tuple[int, str]] = lambda asked, number: (200, "1.0")
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.asked.append(json.loads(body))
                service.headers.append(self.headers)
                status, reply = service.reply(service.asked[-1], len(service.asked))
                if not status:
                    return  # hang up
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(reply.encode())

            def do_GET(self) -> None:  # where a redirect would lead
                self.do_POST()

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_what_is_asked_and_taken(service: Service) -> None:
    service.reply = lambda asked, _: (200, json.dumps({"reward": len(asked["response"]) / 2}))
    assert remote("abc", "7", prompt="2+5?", metadata={"level": 3}, url=service.url) == 1.5
    assert service.asked == [
        {"prompt": "2+5?", "response": "abc", "label": "7", "metadata": {"level": 3}}
    ]
    service.reply = lambda *_: (200, "-2")
    assert remote("", "", url=service.url) == -2.0


def test_a_group_goes_in_one_request(service: Service) -> None:
    service.reply = lambda asked, _: (200, json.dumps([len(text) for text in asked["responses"]]))
    assert remote_group(["a", "", "abc"], "7", url=service.url) == [1.0, 0.0, 3.0]
    service.reply = lambda *_: (200, '{"rewards": [0.5, 1]}')
    assert remote_group(["a", "b"], "7", url=service.url) == [0.5, 1.0]
    assert len(service.asked) == 2
    for reply in ("[1]", "[1, null]", "[1, NaN]", "1", '{"reward": [1, 1]}'):
        service.reply = lambda *_, reply=reply: (200, reply)
        with pytest.raises(module.RemoteReply):
            remote_group(["a", "b"], "7", url=service.url)


@pytest.mark.parametrize(
    "reply",
    [
        *("", "ok", "NaN", "1e999", "-Infinity", "null", "true", '"1.0"', "[1]", "{}", "[" * 9),
        *('{"reward": null}', '{"reward": NaN}', '{"score": 1}', "1" + "0" * 400, "\x00"),
    ],
)
def test_what_is_no_finite_number_is_never_a_reward(service: Service, reply: str) -> None:
    service.reply = lambda *_: (200, reply)
    with pytest.raises(module.RemoteReply):
        remote("a", "7", url=service.url)
    assert len(service.asked) == 1


def test_a_service_that_recovers_is_asked_again(service: Service) -> None:
    service.reply = lambda _, number: [(503, "busy"), (0, ""), (200, "0.5")][number - 1]
    assert remote("a", "7", url=service.url, retries=2) == 0.5


def test_retries_are_bounded(service: Service) -> None:
    service.reply = lambda *_: (500, "1.0")
    with pytest.raises(module.RemoteUnavailable, match="answered 500"):
        remote("a", "7", url=service.url, retries=3)
    assert len(service.asked) == 4


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_a_refusal_is_final(service: Service, status: int) -> None:
    service.reply = lambda *_: (status, "1.0")
    with pytest.raises(module.RemoteStatus, match=f"answered {status}"):
        remote("a", "7", url=service.url)
    assert len(service.asked) == 1


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score?token=secret"
        with pytest.raises(module.RemoteUnavailable, match="ConnectionRefused") as refusal:
            remote("a", "7", url=url, retries=1)
    assert "secret" not in str(refusal.value)


def test_silence_ends_at_the_deadline(service: Service) -> None:
    service.reply = lambda *_: time.sleep(5.0) or (200, "1.0")
    start = time.monotonic()
    with pytest.raises(module.RemoteTimeout, match=r"within 0\.2 s"):
        remote("a", "7", url=service.url, timeout_s=0.2, retries=5)
    assert time.monotonic() - start < 4


def test_the_key_comes_from_the_environment_and_stays_secret(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_KEY", "sesame")
    remote("a", "7", url=service.url, key_env="REWARD_KEY")
    assert service.headers[0]["Authorization"] == "Bearer sesame"
    for bad in ("", "open\nsesame", "sésame"):
        monkeypatch.setenv("REWARD_KEY", bad)
        with pytest.raises(ValueError, match="REWARD_KEY") as refusal:
            remote("a", "7", url=service.url, key_env="REWARD_KEY")
        assert "same" not in str(refusal.value)
    assert len(service.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://me:secret@127.0.0.1/"])
def test_only_plain_web_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="wanted http") as refusal:
        remote("a", "7", url=url)
    assert "secret" not in str(refusal.value)
