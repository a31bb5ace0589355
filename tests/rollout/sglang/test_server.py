"""The real server on a CPU says what transformers says, at every layout, and leaves no trace."""

from __future__ import annotations

import http.client
import math
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from transformers import NemotronHForCausalLM

from miles_lite.parallel import EngineDims
from miles_lite.rollout.sglang.client import KEEPS_S
from miles_lite.rollout.sglang.launch import launch
from miles_lite.rollout.sglang.model_folder import engine_folder
from tests.rollout.sglang import servers
from tests.rollout.sglang.servers import KEY, PROJECT, Server

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

LAYOUTS = {
    "tp1": EngineDims(tp=1, dp=1, ep=1),
    "tp2-ep2": EngineDims(tp=2, dp=1, ep=2),
    "tp2-dp2-ep2": EngineDims(tp=2, dp=2, ep=2),
}
# one shorter than the convolution, some longer than the 16 tokens of a prefill batch
PROMPTS = [[7], [21, 5], [30, 11, 42, 9, 17], list(range(20, 37)), [5 + i % 60 for i in range(70)]]


@pytest.fixture(scope="module", params=LAYOUTS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with servers.serving(tmp_path_factory.mktemp("server"), LAYOUTS[request.param]) as running:
        yield running


@pytest.fixture(scope="module")
def oracle() -> Any:
    model = NemotronHForCausalLM.from_pretrained(servers.MODEL, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps what nobody else does
            module.time_step_limit = (0.0, float("inf"))
    return model


def test_logprobs_and_greedy_tokens_are_those_of_transformers(server: Server, oracle: Any) -> None:
    answers = server.generate(PROMPTS, temperature=0, max_new_tokens=20, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = prompt + answer["output_ids"]
        with torch.no_grad():
            logprobs = oracle(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        meta = answer["meta_info"]
        told = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
        got = torch.tensor([value for value, *_ in told])
        expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        assert logprobs[len(prompt) - 1 : -1].argmax(-1).tolist() == answer["output_ids"]


def test_a_request_may_be_as_long_as_was_promised(server: Server) -> None:
    for length in (2, 127):
        sampling = {"temperature": 1, "max_new_tokens": 128 - length, "ignore_eos": True}
        (answer,) = server.generate([[5] * length], **sampling)
        assert len(answer["output_ids"]) == 128 - length


def test_released_weights_come_back_as_garbage(server: Server) -> None:
    """As on a GPU; so a weight that a sync forgets is seen."""

    def logprobs() -> list[float | None]:
        (answer,) = server.generate([PROMPTS[2]], temperature=0, max_new_tokens=3, ignore_eos=True)
        return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]

    before = logprobs()
    tags = {"tags": ["weights", "kv_cache"]}
    server.call("/release_memory_occupation", tags)
    server.call("/resume_memory_occupation", tags)
    assert all(value is None or math.isnan(value) for value in logprobs())
    server.load_weights()
    assert logprobs() == before


def test_an_idle_connection_is_kept_longer_than_the_client_does(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        for pause_s in (0, 4 * KEEPS_S):
            time.sleep(pause_s)
            connection.request("GET", "/server_info", headers={"Authorization": f"Bearer {KEY}"})
            held = connection.sock
            assert connection.getresponse().read() and connection.sock is held
    finally:
        connection.close()


def test_only_who_has_the_key_is_answered_and_nobody_sees_it(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.call("/server_info", key="another")
    assert caught.value.code == 401
    for process in server.family():
        assert KEY not in " ".join(process.cmdline())
        assert KEY not in str(process.environ())
    assert len(server.family()) >= 3  # itself, a scheduler, a detokenizer
    log = server.log.read_text()
    assert "'api_key': '***'" in log and KEY not in log


PARENT = """
import sys
from pathlib import Path
from miles_lite.rollout.sglang.launch import Launch
Launch(tuple(sys.argv[2:]), {env!r}, {request!r}).start(open(sys.argv[1], "wb"))
input()
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Any) -> None:
    """While it starts, when its children have not yet taken care of that themselves."""
    view = engine_folder(servers.MODEL, tmp_path / "model")
    made = launch(
        servers.spec(view, LAYOUTS["tp2-dp2-ep2"]), servers.Place(port=servers.free_port()), KEY
    )
    code = PARENT.format(env=dict(made.env), request=made.request)
    command = [sys.executable, "-c", code, str(tmp_path / "log"), *made.argv]
    parent = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE)
    family: list[psutil.Process] = []
    end = time.monotonic() + servers.START_S
    while len(family) < 5 and time.monotonic() < end:  # the server, a controller, schedulers, ...
        time.sleep(0.05)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert parent.poll() is None
    assert len(family) >= 5, (tmp_path / "log").read_text()[-3000:]
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(family, 20)[1] == []
