"""The documentation: links lead somewhere, commands take the words they are shown with, and run."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lite.alarms import RULES
from miles_lite.compose import compose

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
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
OF_RUNS = [c for c in WHOLE if c.split()[0] in ("samples", "report") and "second" not in c]
QUICK = [c for c in WHOLE if c.split()[0] in ("plan", "check") and "--verify" not in c]


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


@pytest.mark.slow
@pytest.mark.parametrize("command", QUICK)
def test_commands_that_start_nothing_run(command: str, tmp_path: Path) -> None:
    words = [w.replace("configs/model", f"{PROJECT}/configs/model") for w in shlex.split(command)]
    done = cli(*words, cwd=tmp_path)
    # what cannot run, or does not fit, is said to be so: that too is what the page shows
    refused = "parallel.tp = 4" in done.stderr or "does not fit" in done.stdout
    assert done.returncode == 0 or refused, done.stdout + done.stderr


@pytest.mark.slow
def test_commands_on_a_run_run(tmp_path: Path) -> None:
    small = ["rollout.num_prompts=8", "rollout.samples_per_prompt=4", "train.global_batch=16"]
    words = ["experiment=tiny", "log.name=first", "train.num_steps=2", *small]
    assert cli("train", *words, cwd=tmp_path).returncode == 0
    for command in OF_RUNS:
        shown = command.replace("@20", "@2").replace("--set gsm8k", "--set eval")
        done = cli(*shlex.split(shown.replace(" --open", "")), cwd=tmp_path)
        assert done.returncode == 0, f"{shown}: {done.stderr}"
    assert (tmp_path / "first.html").is_file() and (tmp_path / "runs/first/report.html").is_file()


def test_all_alarms_are_explained() -> None:
    page = (PROJECT / "docs" / "when-something-is-wrong.md").read_text()
    assert [name for name in RULES if f"| `{name}` |" not in page] == []
