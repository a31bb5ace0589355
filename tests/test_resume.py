"""A run that is killed, stopped or moved goes on as if nothing had happened: whole runs."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from miles_lite import cli
from miles_lite.intact import file_digest
from miles_lite.run import read_metrics
from miles_lite.stop import ENDED_ITSELF

# a learning rate that changes, dynamic sampling, two updates a step, an evaluation on the way
WORDS = """
train experiment=tiny log.name=run train.num_steps=8 checkpoint.every=3 eval.every=4
rollout.num_prompts=8 rollout.samples_per_prompt=4 train.global_batch=16
rollout.dynamic_sampling=true optim.warmup_updates=20
""".split()
# times, and what happens to be held
VARYING = ("perf/", "plan/", "memory/", "sync/send_time_max", "alarms/slow", "alarms/memory")


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "miles_lite.cli", *WORDS, f"log.folder={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output[-4000:]
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """At once, and nothing that it started stays, not even what writes a checkpoint just now."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(_lives, family)):
        assert time.monotonic() < deadline, [p for p in family if _lives(p)]
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(run: Path, num_lines: int, process: subprocess.Popen[str]) -> None:
    """Until so many lines of metrics are written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = run / "metrics.jsonl"
        if log.is_file() and log.read_bytes().count(b"\n") >= num_lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {num_lines} lines of metrics: {process.communicate(timeout=5)[0]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Each line as it stands, so that a step logged twice would show."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(VARYING)} for line in lines]


def samples(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): gzip.decompress(path.read_bytes())
        for path in run.rglob("step_*.jsonl.gz")
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf/model.safetensors")


def assert_same_run(got: Path, wanted: Path) -> None:
    assert metrics(got) == metrics(wanted)
    assert samples(got) == samples(wanted)
    ours, theirs = weights(got), weights(wanted)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(launch(folder))
    return folder / "run"


@pytest.mark.slow
def test_each_step_is_logged_once(whole: Path) -> None:
    lines = metrics(whole)
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained == list(range(8))
    assert [line["step"] for line in lines if "eval/eval" in line] == [0, 4, 8]
    assert (whole / "checkpoints/latest").read_text() == "step_000008\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: Path, whole: Path) -> None:
    draw = random.Random(0)
    # before the first checkpoint, after it, after the second; some written in the background
    for num_lines, meanwhile in ((2, "false"), (5, "true"), (8, "true")):
        process = launch(tmp_path, f"checkpoint.asynchronous={meanwhile}")
        wait_for(tmp_path / "run", num_lines, process)
        time.sleep(draw.uniform(0, 1.5))  # in whatever phase of a step, in a save too
        kill(process)
    finish(launch(tmp_path))
    assert_same_run(tmp_path / "run", whole)
    assert "has finished its 8 steps" in finish(launch(tmp_path))


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    for number, (signum, name) in enumerate(((signal.SIGTERM, "TERM"), (signal.SIGINT, "INT"))):
        process = launch(tmp_path, "checkpoint.every=0")
        wait_for(run, 2 + 3 * number, process)
        process.send_signal(signum)
        assert f"stopped by SIG{name}, all of it saved" in finish(process, 128 + signum)
        assert json.loads((run / "summary.json").read_text())["outcome"] == "interrupted"
        assert (run / "checkpoints/latest").is_file()
    finish(launch(tmp_path, "checkpoint.every=0"))
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    process = launch(tmp_path, "train.num_steps=1000")
    wait_for(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert not (tmp_path / "run/checkpoints/step_001000").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    process = launch(tmp_path)
    wait_for(run, 8, process)  # six steps are done
    deadline = time.monotonic() + 60
    while not (run / "checkpoints/step_000006").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(process)
    victim = max((run / "checkpoints/step_000006/policy").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    output = finish(launch(tmp_path))
    assert f"step_000006 is skipped: the contents of policy/{victim.name} have changed" in (
        " ".join(output.split()).replace("- ", "-")
    )
    assert_same_run(run, whole)


@pytest.mark.slow
def test_weights_that_compute_something_else_stop_the_run(tmp_path: Path, whole: Path) -> None:
    """Every byte is as the manifest says, and still one answer of the last step scores otherwise,
    by too little to be seen in the mean of all."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    folder = run / "checkpoints/step_000008"
    probe = dict(np.load(folder / "probe.npz"))
    assert len(probe["lengths"]) == 8 * 4  # the whole rollout
    assert probe["tokens"].size == probe["lengths"].sum()
    ends = np.cumsum(probe["lengths"] - probe["prompt_lengths"])
    probe["scores"][ends[19] : ends[20]] -= 2e-4
    np.savez(folder / "probe.npz", **probe)
    manifest = json.loads((folder / "manifest.json").read_text())
    size, found = (folder / "probe.npz").stat().st_size, file_digest(folder / "probe.npz")
    manifest["files"]["probe.npz"] = {"bytes": size, "hash": found}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    output = " ".join(finish(launch(tmp_path, "train.num_steps=9"), ENDED_ITSELF).split())
    assert "give the last answers of the run log-probs that differ by" in output
    assert "and of one answer by 0.0002: more than 1e-05, or 0.0001 for one" in output
    assert "remove this checkpoint to go on from an older one" in output


@pytest.mark.slow
def test_a_checkpoint_alone_goes_on_as_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied into a folder that is new."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    short = ("train.num_steps=1", "log.wandb_project=p", "eval.every=0")
    finish(launch(tmp_path / "old", *short))
    old, new = tmp_path / "old/run", tmp_path / "new/run"
    shutil.copytree(old / "checkpoints", new / "checkpoints")
    finish(launch(tmp_path / "new", "train.num_steps=2", *short[1:]))
    run_id = (old / "wandb_run_id").read_text().strip()
    assert (new / "wandb_run_id").read_text().strip() == run_id
    files = {file.stem for file in new.glob("wandb/offline-run-*/*.wandb")}
    assert files == {f"run-{run_id}"}
    assert [line["step"] for line in metrics(new) if "train/loss" in line] == [1]
    state = json.loads((new / "checkpoints/step_000002/state.json").read_text())
    assert state["wandb_run_id"] == run_id


@pytest.mark.slow
def test_save_now_saves_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(tmp_path, "checkpoint.every=0", "train.num_steps=12", "eval.every=0")
    wait_for(run, 2, process)
    (run / "save_now").touch()
    finish(process)
    assert not (run / "save_now").exists()
    steps = [int(folder.name[5:]) for folder in sorted((run / "checkpoints").glob("step_*"))]
    assert len(steps) == 2 and 2 <= steps[0] < steps[1] == 12
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == list(range(12))


@pytest.mark.slow
def test_export_refuses_a_damaged_checkpoint(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert cli.run(["export", f"{run}@8", "--out", str(tmp_path / "good")]) == 0
    exported, trained = load_file(tmp_path / "good/model.safetensors"), weights(whole)
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())
    victim = max((run / "checkpoints/step_000008/policy").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert cli.run(["export", str(run), "--out", str(tmp_path / "bad")]) == 2
    told = capsys.readouterr().err
    assert f"step_000008 is damaged: the contents of policy/{victim.name} have changed" in told
    assert "RUN@STEP takes another one of step_000006, step_000008" in told
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_a_lost_config_lets_no_other_settings_in(tmp_path: Path, whole: Path) -> None:
    """The checkpoint knows with what settings it was made."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "config.yaml").unlink()
    lines = (run / "metrics.jsonl").read_bytes()
    output = " ".join(finish(launch(tmp_path, "train.num_steps=9", "optim.lr=1e-3"), 2).split())
    assert "holds a run of other settings, which cannot go on with optim.lr = 0.001" in output
    assert (run / "metrics.jsonl").read_bytes() == lines


@pytest.mark.slow
def test_another_layout_goes_on(tmp_path: Path, whole: Path) -> None:
    """To the weights of the layout that stopped, but for rounding."""
    process = launch(tmp_path)
    wait_for(tmp_path / "run", 5, process)
    (tmp_path / "run/save_now").touch()
    wait_for(tmp_path / "run", 7, process)
    kill(process)
    other = "parallel.tp=2 parallel.pp=2 parallel.dp=1 parallel.ep=2 rollout.engine.num_engines=2"
    finish(launch(tmp_path, *other.split()))
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(whole)
    for step in range(8):
        for key in ("train/loss", "rollout/raw_reward", "train/grad_norm"):
            assert ours[step][key] == pytest.approx(theirs[step][key], abs=1e-5), (step, key)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert max((ours[n] - tensor).abs().max() for n, tensor in theirs.items()) <= 1e-5
