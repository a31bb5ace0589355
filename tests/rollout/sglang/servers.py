"""Real SGLang servers on a CPU, and what to ask them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_lite.parallel import EngineDims
from miles_lite.rollout.sglang.launch import Launch, Place, launch
from miles_lite.rollout.sglang.model_folder import engine_folder
from miles_lite.rollout.sglang.options import EngineSpec

PROJECT = Path(__file__).resolve().parents[3]
MODEL = PROJECT / "configs/model/tiny"
KEY = "the-key-of-the-test"
START_S = 400.0  # 20 s of CPU time for one rank; minutes on a busy machine


def python() -> str:
    """Without it these tests fail, they are not skipped."""
    path = os.environ.get("MILES_LITE_SGLANG_PYTHON") or f"{PROJECT}/.venv-sglang/bin/python"
    if not Path(path).exists():
        pytest.fail(f"{path} is not there: run `bash scripts/setup-sglang-cpu.sh`")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spec(view: Path, dims: EngineDims, **changes: Any) -> EngineSpec:
    sizes: dict[str, Any] = dict(
        folder=view,
        dims=dims,
        dtype="fp32",
        device="cpu",
        max_seq_len=128,
        max_running=8,
        prefill_tokens=16,  # so that longer prompts are read in pieces
        seed=0,
        python=python(),
    )
    return EngineSpec(**{**sizes, **changes})


@dataclass(frozen=True)
class Server:
    port: int
    process: psutil.Process
    log: Path

    def call(self, path: str, body: Mapping[str, Any] | None = None, key: str = KEY) -> Any:
        """POST with a body, else GET. Raises urllib.error.HTTPError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.loads(reply.read() or b"null")

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
        body = {
            "input_ids": prompts,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return self.call("/generate", body)

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def load_weights(self) -> None:
        body = {"model_path": str(MODEL), "load_format": "auto"}
        try:
            self.call("/update_weights_from_disk", body)
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())


@contextlib.contextmanager
def serving(folder: Path, dims: EngineDims) -> Iterator[Server]:
    """A server with the weights of the tiny model, gone without a trace afterwards."""
    view, port = engine_folder(MODEL, folder / "model"), free_port()
    started: Launch = launch(spec(view, dims), Place(port=port), KEY)
    with (folder / "server.log").open("wb") as output:
        process = started.start(output)
    server = Server(port, psutil.Process(process.pid), folder / "server.log")
    try:
        _await_ready(server, process)
        server.load_weights()
        yield server
    finally:
        family = server.family() if process.poll() is None else []
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)
        assert psutil.wait_procs(family, 20)[1] == []


def _await_ready(server: Server, process: Any) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            return server.call("/ready")
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"no server: {server.log.read_text()[-3000:]}")
        time.sleep(0.3)
