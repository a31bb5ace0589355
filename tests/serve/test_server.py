"""The server in a process of its own, asked by the real openai client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from miles_lite.compose import CONFIGS
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.types import Request, Sampling
from tests.listeners import of_family
from tests.rollout.embedded.helpers import ONE, run

FOLDER = CONFIGS / "model" / "tiny"
KEY = "a-key-of-the-test"
ASK: list[Any] = [{"role": "user", "content": "What is 97+70?"}]
MAX_RUNNING, CONTEXT = 4, 2000


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    port = free_port()
    words = (
        f"serve --model {FOLDER} --port {port} --api-key-env SERVE_KEY "
        f"--max-running {MAX_RUNNING} --max-seq-len {CONTEXT}"
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles_lite.cli", *words.split()],
            env={**os.environ, "SERVE_KEY": KEY, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 60
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert of_family(process.pid) == {("127.0.0.1", port)}
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert KEY not in log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def running(url: str) -> int:
    return httpx.get(f"{url}/health").json()["running"]


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    settings = {"model": "tiny", "messages": ASK, "seed": 3, "max_tokens": 60, **changes}
    return client.chat.completions.create(**settings)


def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_tells_what_the_whole_answer_is(client: openai.OpenAI) -> None:
    for seed in range(3):
        asked = {"seed": seed, "logprobs": True, "temperature": 2.0}
        whole = chat(client, **asked, n=2)
        again = chat(client, **asked)
        told = [{"content": "", "reasoning_content": "", "logprobs": []} for _ in range(2)]
        finish, usage = {}, None
        stream = chat(
            client, **asked, n=2, stream=True, stream_options={"include_usage": True}
        )  # fmt: skip
        for chunk in stream:
            usage = chunk.usage or usage
            for part in chunk.choices:
                one = told[part.index]
                one["content"] += part.delta.content or ""
                one["reasoning_content"] += getattr(part.delta, "reasoning_content", None) or ""
                one["logprobs"] += part.logprobs.content if part.logprobs else []
                finish[part.index] = part.finish_reason or finish.get(part.index)
        assert usage == whole.usage
        assert told[0] != told[1]
        for choice, one in zip(whole.choices, told, strict=True):
            assert one["content"] == (choice.message.content or "")
            assert one["reasoning_content"] == choice.message.reasoning_content
            assert [t.token for t in one["logprobs"]] == [t.token for t in choice.logprobs.content]
            assert finish[choice.index] == choice.finish_reason
        assert again.choices[0].message == whole.choices[0].message


def test_answers_and_logprobs_are_the_engines(client: openai.OpenAI) -> None:
    tokenizer = ChatTokenizer.load(FOLDER)
    model = NemotronH.from_folder(FOLDER)
    prompt = tokenizer.encode(tokenizer.render(ASK, {}))
    sampling = Sampling(5, 60, 0.7, 0.9, 20, model.eos_token_ids)
    rank = EngineRank(model, ONE, 0, EngineOptions(max_running=1, max_seq_len=128))
    rank.connect("")
    rank.load_hf(FOLDER)
    rank.set_version(0)
    rank.enter(Phase.generate)
    expected = run(rank, [Request(0, prompt, sampling)])[0]
    rank.close()
    settings = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "logprobs": True, "top_logprobs": 3}
    answer = chat(client, **settings, extra_body={"top_k": 20, "separate_reasoning": False})
    assert answer.choices[0].message.content + "<|im_end|>" == tokenizer.decode(expected.tokens)
    told = answer.choices[0].logprobs.content
    assert [t.logprob for t in told] == pytest.approx(expected.logprobs[:-1], abs=1e-5)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    for token in told:
        top = [one.logprob for one in token.top_logprobs]
        assert top == sorted(top, reverse=True) and len(top) == 3
        assert token.token not in [one.token for one in token.top_logprobs] or (
            token.logprob in top
        )
        assert bytes(token.bytes).decode() == token.token


def test_completions(client: openai.OpenAI) -> None:
    text = ChatTokenizer.load(FOLDER).render(ASK, {})
    answer = client.completions.create(
        model="tiny", prompt=[text, text], seed=3, max_tokens=60, n=2, logprobs=1
    )
    of_chat = chat(client).choices[0].message
    assert len(answer.choices) == 4
    for index in (0, 2):
        assert answer.choices[index].text == (
            f"{of_chat.reasoning_content}</think>{of_chat.content}"
        )
    assert "".join(answer.choices[1].logprobs.tokens) == answer.choices[1].text
    assert answer.usage.prompt_tokens == 2 * chat(client).usage.prompt_tokens
    streamed = client.completions.create(
        model="tiny", prompt=text, seed=3, max_tokens=60, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == answer.choices[0].text


def test_stop_and_length(client: openai.OpenAI) -> None:
    free = chat(client).choices[0]
    stop = free.message.content[2:6]  # of several tokens
    assert free.finish_reason == "stop"
    cut = chat(client, stop=["@@", stop]).choices[0]
    assert cut.message.content == free.message.content.split(stop)[0]
    assert cut.finish_reason == "stop"
    short = chat(client, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert short.choices[0].message.content == ""  # it still thinks


def test_thinking_ends_with_its_budget(client: openai.OpenAI) -> None:
    free = chat(client)
    thought = free.choices[0].message.reasoning_content
    for budget in (0, 2, 1000):
        answer = chat(client, extra_body={"thinking_budget": budget})
        message = answer.choices[0].message
        assert (getattr(message, "reasoning_content", None) or "") == thought[:budget]
        used = answer.usage.completion_tokens_details.reasoning_tokens
        assert used == min(budget, len(thought)) + 1  # with the marker
        if budget == 1000:  # never spent: an interruption that changed nothing
            assert message == free.choices[0].message
        else:
            assert message.content and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "param", "told"),
    [
        ({"extra_body": {"min_seconds": 3}}, "min_seconds", "unknown parameter"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "leave it out or send 0"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.incl", "not served"),
        ({"max_completion_tokens": 3}, "max_tokens", "send one"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "should be 'text'",
        ),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not served"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 1999}, "messages", "is 2000 tokens; you asked for 2018: 19 of the prompt"),
        ({"messages": ASK * 400}, "messages", "maximum context length is 2000 tokens"),
        ({"messages": [{"role": "user", "content": "x", "tool": 1}]}, "messages.0.tool", "unknown"),
        ({"messages": []}, "messages", "at least 1"),
        (
            {"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}},
            "chat_template_kwargs.chat_template",
            "no setting 'chat_template'",
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"messages": []}}},
            "chat_template_kwargs.messages",
            "no setting",
        ),
        ({"top_logprobs": 3}, "top_logprobs", "wants logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "shows it no"),
        ({"n": 1000}, "n", "less than or equal"),
        ({"stop": [""]}, "stop", "at least 1 character"),
    ],
)
def test_a_bad_request_is_answered_with_the_parameter(
    client: openai.OpenAI, changes: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **changes)
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert told in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_settings_of_the_template_and_parts_of_text(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}]
    off = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 0}
    answer = chat(client, messages=parts, extra_body=off)
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens  # </think> for a line end


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    off: Any = {
        "frequency_penalty": 0, "logit_bias": {}, "user": "me", "stop": None, "store": False,
        "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"},
        "function_call": "none", "functions": [], "verbosity": "medium", "modalities": ["text"],
        "stream_options": {"include_obfuscation": False}, "max_completion_tokens": 60,
    }  # fmt: skip
    others = {"min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "stop_token_ids": []}
    answer = chat(client, **off, extra_body=others)
    assert answer.choices[0].message == chat(client).choices[0].message


def test_models_and_errors_of_the_route(url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert caught.value.code == "model_not_found"
    own = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    wrong = httpx.post(f"{url}/v1/embeddings", headers=own)
    assert wrong.status_code == 404 and wrong.json()["error"]["message"]
    broken = httpx.post(f"{url}/v1/completions", headers=own, content=b"{")
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "json_invalid"


def test_a_key_is_wanted(url: str) -> None:
    for key in ("", "wrong", KEY + "x", "wr\u00f6ng"):
        headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
        refused = httpx.get(f"{url}/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        chat(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))


def test_sixteen_clients_at_once_get_what_each_gets_alone(url: str, client: openai.OpenAI) -> None:
    def one(seed: int) -> str:
        if seed % 2:
            return chat(client, seed=seed, temperature=2).choices[0].message.content or ""
        return "".join(
            part.choices[0].delta.content or ""
            for part in chat(client, seed=seed, temperature=2, stream=True)
        )

    alone = [one(seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(16))) == alone
    assert running(url) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slots(
    url: str, client: openai.OpenAI, stream: bool
) -> None:
    """It fills all slots with answers that would take many seconds."""
    body = json.dumps(
        {"model": "tiny", "prompt": "9", "max_tokens": 1900, "stream": stream, "n": MAX_RUNNING}
        | {"ignore_eos": True}
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall((head + body).encode())
        until(lambda: running(url) == MAX_RUNNING)
    until(lambda: running(url) == 0)
    # the slots too, and not only the books: this answer has none to wait for
    assert chat(client, timeout=2).choices[0].finish_reason == "stop"


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100_000 + b"\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\na: " + b"b" * 1_000_000 + b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01" + bytes(range(256)) * 2, b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /\x00\x1b[2J HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"400"),
        (POST + b"Content-Length: 99999999999\r\n\r\n{", b"413"),
        (POST + b"Content-Length: -1\r\n\r\n{", b"400"),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n", b"401"),
    ],
    ids=lambda said: repr(said[:60]),
)
def test_what_is_no_request(url: str, said: bytes, answer: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as raw:
        with contextlib.suppress(ConnectionError):  # closed before it was all sent
            raw.sendall(said)
        try:
            told = raw.recv(1000)
        except ConnectionError:
            told = b""
    assert not told or told.startswith(b"HTTP/1.1 " + answer), told
    assert running(url) == 0


# ------------------------------------------------------------------ what is refused before serving


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--host 0.0.0.0", "--no-auth"),
        ("--api-key-env NO_SUCH_NAME_HERE", "no NO_SUCH_NAME_HERE"),
        ("--max-seq-len 5000", "more than the model's 4096"),
        ("--engine embedded --device cuda", "serves on a CPU only"),
        ("--engine sglang --device cpu --python no-such", "--python no-such: there is no"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    from miles_lite import cli

    assert cli.run(["serve", "--model", str(FOLDER), "--device", "cpu", *words.split()]) == 2
    assert told in capsys.readouterr().err


def test_on_a_gpu_sglang_gets_the_parsers_of_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_lite import cli

    monkeypatch.setenv("SERVE_KEY", KEY)
    words = f"serve --model {FOLDER} --device cuda --tp 8 --dtype bf16 --api-key-env SERVE_KEY"
    assert cli.run([*words.split(), "--print-command"]) == 0
    out = capsys.readouterr().out
    command, _, request = out.partition(" <<< ")
    options = json.loads(request)
    assert command.endswith("-m miles_lite.rollout.sglang.server") and KEY not in out
    assert options["reasoning_parser"] == "nemotron_3"
    assert options["tool_call_parser"] == "qwen3_coder"
    assert (options["host"], options["tp_size"], options["dtype"]) == ("127.0.0.1", 8, "bfloat16")
    assert "load_format" not in options  # the weights are those of the folder
