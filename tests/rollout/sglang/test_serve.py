"""`miles-lite serve --engine sglang`: the real server takes our options, and the openai client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import openai
import psutil
import pytest

from tests.listeners import LOOPBACK, of_family
from tests.rollout.sglang.servers import PROJECT, free_port, python

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
KEY = "only-for-this-test"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    words = ["serve", "--model", f"{PROJECT}/configs/model/tiny", "--engine", "sglang"]
    words += ["--device", "cpu", "--port", str(port), "--python", python(), "--max-seq-len", "512"]
    process = subprocess.Popen(
        [sys.executable, "-m", "miles_lite.cli", *words, "--api-key-env", "SERVE_KEY"],
        env={**os.environ, "SERVE_KEY": KEY, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("serve"),
        # whoever runs the tests in the background has it ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def test_the_client_is_answered_with_the_reasoning_apart(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = server
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    until = time.monotonic() + 500
    while True:
        assert process.poll() is None and time.monotonic() < until
        try:
            assert [model.id for model in client.models.list()] == ["tiny"]
            break
        except openai.APIConnectionError:
            time.sleep(1)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What is 97+70?"}],
        max_tokens=24,
        temperature=0,
        seed=1,
    )
    message = answer.choices[0].message
    told = (message.content or "") + (getattr(message, "reasoning_content", "") or "")
    assert told and answer.usage is not None and 0 < answer.usage.completion_tokens <= 24
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    with pytest.raises(openai.AuthenticationError):  # what a pickle could come through
        client.post("../update_weights_from_tensor", body={}, cast_to=object)


def test_it_listens_on_loopback_alone(server: tuple[subprocess.Popen[bytes], int]) -> None:
    found = of_family(server[0].pid)
    assert ("127.0.0.1", server[1]) in found
    assert {address for address, _ in found} <= LOOPBACK, found


def test_it_ends_with_all_its_processes(server: tuple[subprocess.Popen[bytes], int]) -> None:
    process, _ = server
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    process.wait(60)
    _, alive = psutil.wait_procs(family, 30)
    assert alive == []
