"""The process of an SGLang server: command, environment, what it reads on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from miles_lite.rollout.sglang.options import EngineSpec, options

PROJECT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one node of an engine runs."""

    node_rank: int = 0
    host: str = "127.0.0.1"  # of its HTTP server, which only node 0 has
    port: int
    rendezvous: str = ""  # "host:port" of node 0, where the nodes of an engine meet


@dataclass(frozen=True, slots=True)
class Launch:
    argv: tuple[str, ...]
    env: Mapping[str, str]  # on top of the parent's
    stdin: str  # one line; has the API key

    def start(self, output: IO[bytes] | int | None = None) -> subprocess.Popen[bytes]:
        """The server dies when the returned process's `stdin` is closed, so when this process
        ends. `output` takes stdout and stderr of the server and its children."""
        process = subprocess.Popen(
            self.argv,
            env={**os.environ, **self.env},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        assert process.stdin is not None
        process.stdin.write(self.stdin.encode() + b"\n")
        process.stdin.flush()
        return process


def launch(spec: EngineSpec, place: Place, api_key: str) -> Launch:
    chosen = options(spec) | {
        "host": place.host,
        "port": place.port,
        "node_rank": place.node_rank,
        "dist_init_addr": place.rendezvous or None,
    }
    return Launch(
        argv=(spec.python or sys.executable, "-m", "miles_lite.rollout.sglang.server"),
        env=environment(spec),
        stdin=json.dumps({"options": chosen, "api_key": api_key}),
    )


def environment(spec: EngineSpec) -> dict[str, str]:
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
    }
    if spec.device == "cpu":
        cores = os.cpu_count() or 1
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(r % cores) for r in range(spec.dims.tp)),
            "OMP_NUM_THREADS": "1",
        }
        if spec.dtype == "fp32":
            env["SGLANG_MAMBA_CONV_DTYPE"] = "float32"
    return env
