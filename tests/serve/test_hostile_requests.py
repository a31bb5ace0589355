"""Whatever is posted is answered, or refused in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_lite.compose import CONFIGS
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.serve.live import LiveEngine
from miles_lite.serve.server import Served, application
from miles_lite.serve.wire import ChatAsk, CompletionAsk

TINY = CONFIGS / "model" / "tiny"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "1+1"}], "max_tokens": 2},
    TEXT: {"model": "tiny", "prompt": "1+1", "max_tokens": 2},
}
LIMIT_S = 15.0  # on a busy host; each takes less than half a second


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = LiveEngine(TINY, EngineOptions(max_running=4, max_seq_len=200))
    served = Served("tiny", ChatTokenizer.load(TINY), engine, "")
    with TestClient(application(served), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, path: str, body: bytes) -> Any:
    begin = time.monotonic()
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert time.monotonic() - begin < LIMIT_S
    return answer


def assert_sound(answer: Any) -> None:
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] in ("invalid_request_error", "not_found_error")
    assert len(answer.content) < 5_000


def message(role: Any = "user", content: Any = "1+1", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}


def call(arguments: Any) -> dict[str, Any]:
    made = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return message("assistant", "", tool_calls=[made])


def tool(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}]}


BODIES = {
    "empty": b"",
    "nuls": b"\0" * 10,
    "no utf-8": b'{"model":"\xff\xfe"}',
    "utf-16": '{"model":"tiny"}'.encode("utf-16"),
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep messages": b'{"model":"tiny","messages":' + b"[" * 900 + b"]" * 900 + b"}",
    "digits": b'{"seed":' + b"9" * 5000 + b"}",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"x"',
    "too large": b'{"model":"' + b"a" * 3_000_000 + b'"}',
    "doubled keys": b'{"model":"tiny","model":"x","prompt":"1","prompt":[]}',
}
CHANGES: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (10**100, -1, 2**64, 2**63, 1.5, True)),
    *({"temperature": value} for value in (float("nan"), float("inf"), -1, "hot", 10**400)),
    *({"top_k": value} for value in (10**30, -2, 0.5)),
    *({"max_tokens": value} for value in (0, -1, 10**30, 10**400, "2")),
    *({"n": n} for n in (0, 10**9, 10**400)),
    *({"stop": stop} for stop in (["a" * 10**5], ["a"] * 1000, ["\ud800"], [[]], {}, "\0")),
    *({"stream_options": value} for value in (1, {"include_usage": 1}, {"\ud800": 1})),
    *({"model": model} for model in ("\ud800", "\x1b[31m", "../../etc/passwd", None, [], "")),
    {"logit_bias": {"1": 1}},
    {"\ud800": 1},
    {"\x1b[2J": 1},
    {"logprobs": 10**9},
    {"echo": True},
    {"suffix": "\ud800"},
]
OF_CHAT: list[dict[str, Any]] = [
    message(content="\ud800"),
    message(role="\ud800"),
    message(role="\x1b[31m"),
    message(content="\x00\x1b[2J\u202e<script>"),
    message(content="1 " * 100_000),
    message(content=[{"type": "text", "text": "a"}] * 10_000),
    message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    message(content={"text": "a"}),
    {"messages": [{"role": "user", "content": "a"}] * 20_000},
    {"messages": {"0": {}}},
    *map(call, ("[" * 10_000, "[" * 500 + "]" * 500, "[1]", '"9"', "NaN", '"\ud800"', "", 3)),
    *map(tool, ({"properties": [1]}, {"a": [[[]]]}, "x", [1], {"\ud800": 1})),
    *(
        {"chat_template_kwargs": value}
        for value in ({"enable_thinking": {"a": 1}}, {"enable_thinking": [1] * 1000}, {"x": 1}, [])
    ),
    {"chat_template_kwargs": {"chat_template": "{{ 'a' * 10 ** 11 }}"}},
    *({"thinking_budget": value} for value in (10**30, -1, 1.5, 10**400)),
    {"logprobs": True, "top_logprobs": 20},
    {"tool_choice": {"type": "function"}},
]
OF_TEXT: list[dict[str, Any]] = [
    {"prompt": prompt}
    for prompt in (
        *(
            [],
            [[]],
            [[1], []],
            [[[1]]],
            ["a", 1],
            ["a"] * 20_000,
            {},
            3,
            "",
            "\ud800",
            "1 " * 10**6,
        ),
        *([10**30], [-1], [True, True], [1] * 200_000, [1.5], ["\ud800"]),
    )
]
CASES = (
    [(path, body) for path in BASE for body in BODIES.values()]
    + [(path, json.dumps(BASE[path] | change).encode()) for path in BASE for change in CHANGES]
    + [(CHAT, json.dumps(BASE[CHAT] | change).encode()) for change in OF_CHAT]
    + [(TEXT, json.dumps(BASE[TEXT] | change).encode()) for change in OF_TEXT]
)


@pytest.mark.parametrize(
    ("path", "body"), CASES, ids=[f"{path[4:]}{body[:70]!r}" for path, body in CASES]
)
def test_a_body_is_answered_or_refused(client: TestClient, path: str, body: bytes) -> None:
    assert_sound(post(client, path, body))
    assert client.get("/health").json() == {"status": "ok", "running": 0}


@pytest.mark.parametrize("path", ["%ff", "%00", "../../x", "a" * 5000, "%1b[31m", "%ed%a0%80"])
def test_so_is_a_path(client: TestClient, path: str) -> None:
    for place in (f"/v1/models/{path}", f"/{path}"):
        answer = client.get(place)
        assert_sound(answer)
        assert answer.status_code == 404


# ------------------------------------------------------------------ any JSON

KEYS = sorted({*ChatAsk.model_fields, *CompletionAsk.model_fields} - {"n", "max_tokens"})
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "text", "function", "auto", "\ud800", "1+1"])
)  # fmt: skip
FIELDS = st.sampled_from(
    "role content type text function name arguments parameters properties tool_calls id".split()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, derandomize=True)
@given(st.sampled_from([CHAT, TEXT]), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_json_is_answered_or_refused(
    client: TestClient, path: str, change: dict[str, Any]
) -> None:
    assert_sound(post(client, path, json.dumps(BASE[path] | change).encode()))
