"""The documentation: links lead somewhere, commands take the words they are shown with, and run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lite.alarms import RULES
from miles_lite.compose import compose

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", PROJECT / "SECURITY.md", *sorted((PROJECT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)")
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|/)miles-lite (.*)")
# Words that stand for something else, or of a world that is not here.
STANDS_FOR = re.compile(r"\b(NAME|DIR|RUN|TEAM|FILE)\b|\.\.\.|[<\[|]|\$|10\.0\.0")


def commands() -> Iterator[str]:
    """Those in blocks of code, without comments and `miles-lite`."""
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").split("\n"):
                if found := COMMAND.search(re.sub(r"(^|\s)#.*", "", line).strip()):
                    yield " ".join(found.group(1).split())


COMMANDS = sorted({command for command in commands() if not command.startswith("check:")})
WHOLE = [command for command in COMMANDS if not STANDS_FOR.search(command)]
OF_RUNS = [c for c in WHOLE if re.search(r"runs/first|my\.jsonl", c)]
SMALL = ["rollout.num_prompts=8", "rollout.samples_per_prompt=4", "train.global_batch=16"]
QUICK = [c for c in WHOLE if c.split()[0] in ("plan", "check") and "--verify" not in c]

FIRST_RUN = "train experiment=tiny log.name=first train.num_steps=20"
# What other tests run: those of the command, with settings that take less time.
ELSEWHERE = {
    "chaos experiment=tiny --kill engine,trainer,driver,reward --times 50 --seed 0": (
        "test_supervise.py"
    ),
    "doctor": "doctor/test_command.py",
    "doctor experiment=tiny": "doctor/test_command.py",
    "plan experiment=nemotron3_ultra --verify": "planner/test_plan.py",
    "reward-audit experiment=tiny": "test_cli.py",
    "reward-audit experiment=tiny data=gsm8k": "data/test_data_configs.py",  # without the hub
    "serve --model configs/model/tiny": "serve/test_server.py",
    "train experiment=tiny algo=dapo optim.lr=2e-4 parallel.tp=2 parallel.dp=1": "test_train.py",
    "train --supervise experiment=tiny log.name=first train.num_steps=20": "test_supervise.py",
    FIRST_RUN: "test_docs.py",
    "train experiment=tiny rollout.engine.backend=sglang rollout.engine.python="
    ".venv-sglang/bin/python": "rollout/sglang/test_grpo.py",
}


@functools.cache
def help_of(word: str) -> str:
    done = cli(word, "--help")
    return done.stdout + done.stderr


def cli(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miles_lite.cli", *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [PROJECT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            todo += [(page.parent / link).resolve() for link in LINK.findall(page.read_text())]
    assert set(PAGES) <= reached


def test_there_are_commands_of_every_kind() -> None:
    usage = help_of("--help")
    kinds = {command.split()[0] for command in COMMANDS}
    assert kinds >= {"train", "plan", "doctor", "report", "drift", "eval", "serve", "replay"}
    assert all(f"miles-lite {kind} " in usage for kind in kinds)


@pytest.mark.parametrize("command", WHOLE)
def test_commands_take_the_words_they_are_shown_with(command: str) -> None:
    word, *words = shlex.split(command)
    overrides = [w for w in words if re.fullmatch(r"\+?[\w.]+=.*", w)]
    if any(w.startswith("experiment=") for w in overrides):
        compose(overrides)
    flags = [w for w in words if w.startswith("--")]
    assert [flag for flag in flags if flag not in help_of(word)] == []


def test_every_command_is_run_by_a_test() -> None:
    assert {*QUICK, *OF_RUNS, *ELSEWHERE} == set(WHOLE)
    tests = Path(__file__).parent
    for command, file in ELSEWHERE.items():
        assert command.split()[0].split("-")[0] in (tests / file).read_text(), command


@pytest.mark.slow
@pytest.mark.parametrize("command", QUICK)
def test_commands_that_start_nothing_run(command: str, tmp_path: Path) -> None:
    words = [w.replace("configs/model", f"{PROJECT}/configs/model") for w in shlex.split(command)]
    done = cli(*words, cwd=tmp_path)
    # what cannot run, or does not fit, is said to be so: that too is what the page shows
    refused = "parallel.tp = 4" in done.stderr or "does not fit" in done.stdout
    assert done.returncode == 0 or refused, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_on_a_run_run(tmp_path: Path) -> None:
    assert cli(*FIRST_RUN.split(), *SMALL, cwd=tmp_path).returncode == 0
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "second")
    row = {"prompt": "What is 1+2?", "label": "3"}
    (tmp_path / "my.jsonl").write_text(json.dumps(row) + "\n")
    here = {" --open": "", "DIR": "exported"}  # steps and names stay as they are shown
    here |= {f" {folder}/": f" {PROJECT}/{folder}/" for folder in ("rewards", "configs")}
    for shown in [*OF_RUNS, *(c for c in COMMANDS if c.startswith("export runs/first"))]:
        command = functools.reduce(lambda text, pair: text.replace(*pair), here.items(), shown)
        if command.startswith("serve"):
            _serves(shlex.split(command), tmp_path)
            continue
        done = cli(*shlex.split(command), cwd=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    files = (
        "first.html",
        "runs/first/report.html",
        "runs/first/drift.json",
        "exported/config.json",
    )
    assert [file for file in files if not (tmp_path / file).is_file()] == []


def _serves(words: list[str], folder: Path) -> None:
    """It answers, and ends when it is told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "miles_lite.cli", *words, "--port", str(port)]
    server = subprocess.Popen(argv, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < until
            with contextlib.suppress(urllib.error.URLError):
                url = f"http://127.0.0.1:{port}/v1/models"
                assert b'"first"' in urllib.request.urlopen(url, timeout=10).read()
                break
            time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == -signal.SIGTERM  # which its library leaves to the system
    finally:
        server.kill()
        server.wait()


def test_all_alarms_are_explained() -> None:
    page = (PROJECT / "docs" / "when-something-is-wrong.md").read_text()
    assert [name for name in RULES if f"| `{name}` |" not in page] == []
