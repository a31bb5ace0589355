"""Disks that are full, read-only or slow, and clocks that jump: in mounts of our own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from miles_lite import supervise
from miles_lite.compose import compose
from miles_lite.config import Config
from miles_lite.environment import PROJECT
from miles_lite.intact import file_digest, writing
from miles_lite.protocols import StepResult
from miles_lite.run import Run, RunError, read_metrics, read_samples
from miles_lite.summary import RESTARTS, read_restarts
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict
from miles_lite.weights.hf import HfCheckpoint, HfWriter

NEW_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
CAN_MOUNT = shutil.which("unshare") and not subprocess.call([*NEW_MOUNTS, "true"])
needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="no user namespaces here")


def mounted(folder: Path, size: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command that sees a file system of that size at `folder`."""
    folder.mkdir()
    script = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    return subprocess.run(
        [*NEW_MOUNTS, "sh", "-c", script, str(folder), *words],
        capture_output=True, text=True, timeout=280, cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def tiny(folder: Path) -> Config:
    cfg = compose(["experiment=tiny"])
    return replace(cfg, log=replace(cfg.log, folder=folder, name="run"))


# ------------------------------------------------------------------ full: all but checkpoints


@needs_mounts
def test_a_full_disk_damages_nothing_that_was_complete(tmp_path: Path) -> None:
    code = "import sys, pathlib, tests.test_disk as t; t.fill(pathlib.Path(sys.argv[1]))"
    done = mounted(tmp_path / "disk", "4m", sys.executable, "-c", code, str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr[-4000:]


def fill(disk: Path) -> None:
    """Metrics, samples and the exported model meet a full disk one after the other."""
    cfg, now = tiny(disk), datetime(2025, 1, 2)
    text, draw = "x" * 100, random.Random(0)
    prompt = Prompt("set:0", (1, 2), text, "42", reward="", metadata={})
    answer = Completion(
        tuple(range(400)), tuple(-draw.random() for _ in range(400)), version=3, finish=Finish.stop
    )
    group = Group((Sample(prompt, answer, text, Verdict(1.0, "")),))
    hf = disk / "run/hf"
    num_logged = num_saved = 0
    with pytest.raises(RunError) as caught, Run.open(cfg, now) as run:
        run.log(-1, {"train/loss": 1.0})
        export(cfg, hf)
        whole = digests(hf)
        with suppress(RunError):
            while True:
                run.save_eval(num_saved, "set", [group] * 40)
                num_saved += 1
        (disk / "filler").write_bytes(b"")
        with pytest.raises(RunError, match=r"hf: No space left on device; 0 MiB are free there"):
            export(cfg, hf)
        shutil.rmtree(disk / "run/hf.part")
        fill_up(disk / "filler")
        while True:
            run.log(num_logged, {"train/loss": 1.0 / (num_logged + 1)})
            num_logged += 1
    assert "metrics.jsonl: No space left on device; 0 MiB are free there" in str(caught.value)
    assert num_saved > 1 and num_logged > 1, (num_saved, num_logged)

    remount(disk, "size=16m")
    assert digests(hf) == whole
    assert len(read_metrics(disk / "run")) == num_logged + 1
    evaluated = sorted((disk / "run/eval/set").iterdir())
    assert len(evaluated) == num_saved
    assert all(len(list(read_samples(file))) == 40 for file in evaluated)
    with Run.open(cfg, now) as run:
        run.log(num_logged, {"train/loss": 0.0})
        run.save_samples(num_logged, [], StepResult({}, {}, {}), [])
        export(cfg, hf)
        assert digests(hf) == whole and len(read_metrics(disk / "run")) == num_logged + 2

    remount(disk, "ro")
    with pytest.raises(RunError, match=r"disk: Read-only file system; \d+ MiB are free there"):
        Run.open(cfg, now)


def export(cfg: Config, folder: Path) -> None:
    source = HfCheckpoint(cfg.model.path)
    with writing(folder):
        writer = HfWriter(folder, source)
        writer.create()
        for name in source.names():
            writer.copy_from_template(name)
        writer.finish()


def digests(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in folder.iterdir()}


def fill_up(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(b"\0" * 4096)


@needs_mounts
def test_a_full_disk_costs_a_supervisor_one_line(tmp_path: Path) -> None:
    code = "import sys, pathlib, tests.test_disk as t; t.restarts(pathlib.Path(sys.argv[1]))"
    done = mounted(tmp_path / "disk", "1m", sys.executable, "-c", code, str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "restarts.jsonl: No space left on device; 0 MiB are free there" in done.stderr


def restarts(disk: Path) -> None:
    """The run goes on, is restarted again with room, and its end can read of both."""
    run, codes = disk / "run", [137, 0, 137, 0]
    run.mkdir()
    noted = {"time": 1.0, "step": 0, "code": 1, "cause": "x" * 4000}
    (run / RESTARTS).write_text(json.dumps(noted) + "\n")  # so that the next one is cut
    supervise.FIRST_WAIT_S = 0.01

    async def attempt() -> int:
        return codes.pop(0)

    def supervised() -> int:
        return asyncio.run(supervise.supervise(run, attempt, 10, lambda: False))

    fill_up(disk / "filler")
    assert supervised() == 0
    assert not (run / RESTARTS).read_text().endswith("\n") and len(read_restarts(run)) == 1
    (disk / "filler").unlink()
    assert supervised() == 0
    assert [line["code"] for line in read_restarts(run)] == [1, 137]
