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

from miles_lite import orphan
from miles_lite.cluster.network import interface_env
from miles_lite.rollout.sglang.options import EngineSpec, options

PROJECT = Path(__file__).resolve().parents[3]

SERVER_KEEPS_S = 60  # an idle connection; SGLang's own choice is 5

_NOT_INHERITED = (
    "PYTHONPATH",  # leads to this interpreter's torch
    "PYTHONHOME",
    # a trainer may ask for expandable segments: memory that the allocator which releases an
    # engine's memory never sees
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    orphan.SPAWNER,  # a server watches its standard input instead
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one node of an engine runs."""

    port: int  # of its HTTP server, which only node 0 has
    host: str = "127.0.0.1"
    node_rank: int = 0
    rendezvous: str = ""  # host:port of node 0, where the nodes meet; "" for an engine of one node
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; () keeps what is visible


@dataclass(frozen=True, slots=True)
class Launch:
    """A server to be started on this host."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # all of it
    request: str  # what it reads from its standard input: a line with options and the keys

    @classmethod
    def of(
        cls,
        python: str,
        env: Mapping[str, str],
        options: Mapping[str, object],
        api_key: str,
        admin_key: str,
    ) -> Launch:
        """python: interpreter that has sglang, "" for this one; api_key: "" for none; admin_key:
        what alone opens the ways to the weights, one of which unpickles; "" for the API key."""
        argv = (python or sys.executable, "-m", "miles_lite.rollout.sglang.server")
        keys = {"api_key": api_key, "admin_api_key": admin_key}
        return cls(argv, env, json.dumps({"options": options, "keys": keys}))

    def start(self, output: IO[bytes] | int | None = None) -> subprocess.Popen[bytes]:
        """The server and its children die when `stdin` of the returned process is closed, so also
        when this process ends, in whatever way. `output` takes their stdout and stderr."""
        process = subprocess.Popen(
            self.argv,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
        assert process.stdin is not None
        process.stdin.write(self.request.encode() + b"\n")
        process.stdin.flush()
        return process


def launch(spec: EngineSpec, place: Place, api_key: str) -> Launch:
    """ConfigError if spec.extra contradicts what the rest of the configuration says."""
    chosen = options(spec) | {
        "host": place.host,
        "port": place.port,
        "nnodes": spec.num_nodes,
        "node_rank": place.node_rank,
        "dist_init_addr": place.rendezvous or None,
    }
    env = environment(spec, place.host)
    if place.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    return Launch.of(spec.python, env, chosen, api_key, "")


def environment(spec: EngineSpec, host: str = "127.0.0.1") -> dict[str, str]:
    """Of every process that imports sglang for this engine. host: where its ranks meet others."""
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    env = interface_env(host) | env
    env |= {
        "SGLANG_HOST_IP": host,  # else it asks the route to the internet for its address
        "SGLANG_TIMEOUT_KEEP_ALIVE": str(SERVER_KEEPS_S),
        "OMP_NUM_THREADS": str(spec.threads),
        "HF_HUB_OFFLINE": "1",  # everything is in the model's folder
        # the longest request may end just where the model's config does, and CONTEXT_SLACK beyond
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if (PROJECT / "pyproject.toml").is_file():  # else miles_lite is installed in both interpreters
        env["PYTHONPATH"] = str(PROJECT)
    if spec.dtype == "fp32":
        env["SGLANG_MAMBA_CONV_DTYPE"] = "float32"  # bf16 else, whatever the dtype
    if spec.device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        # which cores each rank may use: SGLang insists on being told once there are more ranks than
        # NUMA nodes
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * spec.dims.tp)
    return env
