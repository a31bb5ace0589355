"""What an answer can make a reward function do: no sockets, no secrets, no endless computing."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from miles_lite.config import RewardFunction
from miles_lite.rollout.reward_limits import limit_cpu
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.types import Prompt, Verdict

SOURCE = """
import os, socket, subprocess, sys

def act(response, label, *, key_env="", port=0):
    if response == "internet":
        socket.socket().connect(("127.0.0.1", port))
    elif response == "service of the host":
        socket.socket(socket.AF_UNIX)
    elif response == "child":
        code = "import socket; socket.socket()"
        return float(subprocess.run([sys.executable, "-c", code], stderr=-3).returncode == 0)
    elif response == "secrets":
        return float(key_env in os.environ) + sum("sesame" in v for v in os.environ.values())
    elif response == "core":
        import resource
        return float(resource.getrlimit(resource.RLIMIT_CORE)[0])
    return 1.0
"""


def verdicts(file: Path, responses: Sequence[str], **options: object) -> list[Verdict]:
    function = RewardFunction(file=file, function="act", options=options)

    async def grade(workers: RewardWorkers) -> list[Verdict]:
        prompts = [Prompt("a:0", (1,), "q", "label", "", {})] * len(responses)
        return [await workers.grade(*both) for both in zip(prompts, responses, strict=True)]

    with RewardWorkers({"": function}, 1, RewardLimits(timeout_s=10)) as workers:
        return asyncio.run(grade(workers))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTHER_API_KEY", "PGPASSWORD", "MYSQL_PWD", "SSHPASS", "OPENAI_API_KEYS"):
        monkeypatch.setenv(name, "open-sesame")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:open-sesame@proxy:3128")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:open-sesame@host/db")
    monkeypatch.setenv("JUDGE_KEY_API_KEY", "of the judge")


def test_a_worker_has_no_network_no_secrets_and_dumps_no_core(
    tmp_path: Path, planted: None
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(SOURCE)
    found = verdicts(file, ["internet", "service of the host", "child", "secrets", "core"])
    refused = Verdict(0.0, "error: PermissionError")
    assert found == [refused, refused, *[Verdict(0.0, "")] * 3]


def test_a_file_that_asks_has_the_network_and_an_option_the_key_that_it_names(
    tmp_path: Path, planted: None
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(SOURCE + "NETWORK = True\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = {"key_env": "JUDGE_KEY_API_KEY", "port": server.getsockname()[1]}
        assert verdicts(file, ["internet", "secrets"], **options) == [Verdict(1.0, "")] * 2


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    code = f"from miles_lite.rollout import reward_limits as limits\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_where_the_kernel_has_no_filters_python_refuses_and_says_so() -> None:
    code = "limits._MACHINES.clear()\nprint(limits.refuse_network())\nimport socket\n"
    done = in_a_process(code + "socket.create_connection(('127.0.0.1', 9))")
    assert "unknown calls of linux" in done.stdout
    assert "PermissionError: a reward worker" in done.stderr


def test_computing_ends_also_without_a_parent_that_kills() -> None:
    done = in_a_process(f"limits.{limit_cpu.__name__}(0.5)\nwhile True: pass")
    assert done.returncode == -24  # SIGXCPU
