"""Which endings of a driver are accidents, and whole runs that survive them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from miles_lite import cli, supervise
from miles_lite.run import read_metrics
from miles_lite.stop import ENDED_ITSELF, SIGNALS
from miles_lite.summary import read_restarts
from miles_lite.supervise import (
    FIRST_WAIT_S,
    MAX_WAIT_S,
    SAME_ERRORS,
    Ending,
    decide,
)

KILLED = Ending(137, 3, "the driver was killed by SIGKILL")
BUG = Ending(1, 3, "KeyError: 'a'")


@pytest.mark.parametrize("code", [0, 2, ENDED_ITSELF, 130, 143])
def test_what_ends_for_a_reason_is_not_started_again(code: int) -> None:
    assert not decide([Ending(code, 3, "")], 10).again


@pytest.mark.parametrize("code", [1, 134, 137, 139])
def test_a_crash_is_an_accident(code: int) -> None:
    decision = decide([Ending(code, 3, "so it was")], 10)
    assert decision.again and decision.why == "so it was" and decision.wait_s == FIRST_WAIT_S


def test_restarts_without_progress_are_bounded() -> None:
    killed = [Ending(137, step, "killed by SIGKILL") for step in range(50)]
    assert all(decide(killed[:n], 1).again for n in range(1, 51))
    back = [Ending(137, n, "killed by SIGKILL") for n in (48, 47, 49)]  # trained once before
    assert decide([*killed, *back[:2]], 3).again
    given_up = decide([*killed, *back], 3)
    assert not given_up.again and "3 times without a step beyond 49" in given_up.why
    assert decide([*killed, *back, Ending(137, 50, "")], 3).again
    assert not decide(killed[:1], 0).again


def test_the_wait_doubles_until_there_is_progress() -> None:
    """Different errors at the same step are not one bug."""
    stuck = [Ending(1, 3, cause) for cause in "abcdefghij"]
    waits = [decide(stuck[:n], 99).wait_s for n in range(1, 11)]
    assert waits[:4] == [FIRST_WAIT_S * 2**n for n in range(4)] and waits[-1] == MAX_WAIT_S
    assert decide([*stuck, Ending(1, 4, "j")], 99).wait_s == FIRST_WAIT_S


def test_the_same_error_at_the_same_step_is_a_bug() -> None:
    assert decide([BUG] * (SAME_ERRORS - 1), 99).again
    given_up = decide([BUG] * SAME_ERRORS, 99)
    assert not given_up.again and "3 times in a row it ended after 3 steps" in given_up.why
    further = Ending(1, 4, BUG.cause)
    assert decide([*[BUG] * (SAME_ERRORS - 1), further], 99).again
    assert decide([BUG, BUG, KILLED, BUG], 99).again


def test_numbers_make_no_other_error() -> None:
    alike = [Ending(1, 3, f"OSError: port {n} of actor {n:016x}") for n in (99, 170, 5)]
    assert not decide(alike, 99).again
    assert decide([*alike[:2], Ending(1, 3, "OSError: no port")], 99).again


def test_a_process_may_be_killed_often_at_the_same_step() -> None:
    for end in (KILLED, Ending(1, 3, "trainer rank 0 died in 'step': its process 7 was killed")):
        assert decide([end] * 10, 10).again
        assert not decide([end] * 11, 10).again


def test_each_restart_is_noted_with_its_own_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is killed says nothing, and what the one before said is not its cause."""
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 0.01)
    run, codes = tmp_path / "run", [137, 1, 137, 0]

    async def attempt() -> int:
        code = codes.pop(0)
        if code == 1:
            (run / "metrics.jsonl").write_text('{"step": 4, "perf/step_time": 1.0}\n')
            (run / "summary.json").write_text('{"error": "RuntimeError: pages\\n of it"}')
        return code

    assert asyncio.run(supervise.supervise(run, attempt, 10, lambda: False)) == 0
    killed = "the driver was killed by SIGKILL"
    noted = [(line["step"], line["code"], line["cause"]) for line in read_restarts(run)]
    assert noted == [(0, 137, killed), (5, 1, "RuntimeError: pages of it"), (5, 137, killed)]
    codes.append(137)
    assert asyncio.run(supervise.supervise(run, attempt, 10, lambda: True)) == 137
    assert len(read_restarts(run)) == 3


def test_a_status_above_128_need_be_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 0.01)
    codes = [255, 0]

    async def attempt() -> int:
        return codes.pop(0)

    assert asyncio.run(supervise.supervise(tmp_path, attempt, 10, lambda: False)) == 0
    assert [line["cause"] for line in read_restarts(tmp_path)] == [
        "the driver ended with status 255"
    ]


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_between_two_attempts_is_the_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
) -> None:
    async def killed(self: supervise.Foreground, command: str, words: Sequence[str]) -> int:
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signum)
        return 137

    monkeypatch.setattr(supervise.Foreground, "run", killed)
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 30.0)
    words = ["--supervise", "experiment=tiny", f"log.folder={tmp_path}"]
    assert cli.run(["train", *words]) == 128 + signum
    assert f"stopped by {signum.name}, between two attempts" in capsys.readouterr().err


# ------------------------------------------------------------------ whole runs

# one process of each kind, and little to do
SMALL = """
experiment=tiny parallel.dp=1 parallel.ep=1 rollout.engine.tp=1 rollout.engine.dp=1
rollout.engine.ep=1 rollout.num_prompts=8 rollout.samples_per_prompt=4 train.global_batch=16
eval.every=0 data.eval=
""".split()


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "miles_lite.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], deadline_s: float) -> str:
    """Its output; kills everything it started if it does not end."""
    try:
        return process.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], within_s: float = 150
) -> None:
    deadline = time.monotonic() + within_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that we looked at ended
            if condition():
                return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(process.communicate()[0][-4000:])


def trained(run: Path) -> int:
    return max((step for step, m in read_metrics(run).items() if "train/loss" in m), default=-1) + 1


def left(family: Sequence[psutil.Process], within_s: float) -> list[str]:
    """What of these still lives after so long."""
    deadline = time.monotonic() + within_s
    while True:
        alive = [str(p) for p in family if p.is_running() and p.status() != "zombie"]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_trainer_and_driver_die_and_the_run_ends_as_if_they_had_not(tmp_path: Path) -> None:
    """The number of kills is not bounded by that of steps."""
    words = ["--kill", "trainer,driver", "--times", "3", *SMALL, f"log.folder={tmp_path}"]
    process = start("chaos", *words, "log.name=chaos", "train.num_steps=3")
    output = ended(process, 380)
    assert process.returncode == 0, output[-4000:]
    folder = tmp_path / "chaos"
    told = json.loads((folder / "chaos.json").read_text())
    assert {kill["kind"] for kill in told["kills"]} == {"trainer", "driver"}
    assert len(told["kills"]) == 3 and all(kill["resumed"] for kill in told["kills"])
    assert told["samples"] == 3 * 32 and told["weights_equal"]
    assert (told["lost"], told["doubled"], told["differing"]) == (0, 0, {})

    summary = json.loads((folder / "disturbed/summary.json").read_text())
    restarts = read_restarts(folder / "disturbed")
    assert 1 < len(restarts) <= 3  # one of the kills may fall into the end after another
    assert summary["outcome"] == "finished" and summary["restarts"] == len(restarts)
    causes = " ".join(line["cause"] for line in restarts)
    assert "the driver was killed by SIGKILL" in causes and "trainer rank 0" in causes
    assert "restarts           " in (folder / "disturbed.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_ray_it_is_started_again_and_asked_to_stop_it_is_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SMALL, f"log.folder={tmp_path}", "log.name=run", "train.num_steps=1000"]
    process = start("train", "--supervise", *words, "checkpoint.every=1")
    wait_for(lambda: (run / "checkpoints/latest").is_file(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    [head] = [child for child in family if child.name() == "gcs_server"]
    head.kill()
    wait_for(lambda: bool(read_restarts(run)), process, 10)
    [restart] = read_restarts(run)
    assert restart["step"] >= 1 and restart["code"] == 1
    assert restart["cause"].startswith("Ray's head (GCS) on")
    assert left(family, 1) == []

    wait_for(lambda: trained(run) > restart["step"], process)
    wait_out_a_slow_disk(process, run)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output = ended(process, 60)
    assert process.returncode == 128 + signal.SIGTERM, output[-4000:]
    assert "stopped by SIGTERM, all of it saved" in output
    assert output.count("restart ") == 1 and "not started again" not in output
    assert left(family, 5) == []


def wait_out_a_slow_disk(process: subprocess.Popen[str], run: Path) -> None:
    """Whoever writes a checkpoint does not get on for some seconds: the run waits, and goes on."""
    writers: list[psutil.Process] = []

    def saving() -> bool:
        family = psutil.Process(process.pid).children(recursive=True)
        writers[:] = [
            p for p in family if "".join(p.cmdline()).startswith("ray::MegatronWorker.sa")
        ]
        return bool(writers)

    wait_for(saving, process)
    for writer in writers:
        writer.suspend()
    before = trained(run)
    time.sleep(3)
    assert trained(run) == before
    for writer in writers:
        writer.resume()
    wait_for(lambda: trained(run) > before + 1, process)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--supervise"]])
def test_killed_it_takes_all_along(tmp_path: Path, words: list[str]) -> None:
    """Ray's agents too, which would look for their head for a minute."""
    process = start("train", *words, *SMALL, f"log.folder={tmp_path}")

    def family() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    agent = "ray::RuntimeEnvAgent"
    wait_for(lambda: any(agent in p.cmdline()[0] for p in family() if p.cmdline()), process)
    wait_for(lambda: any("ray-reaper" in p.cmdline() for p in family()), process)
    alive = family()
    process.kill()
    assert left(alive, 10) == []
    process.communicate()


@pytest.mark.slow
def test_an_evaluation_whose_engine_dies_ends_and_says_so(tmp_path: Path) -> None:
    words = [*SMALL[:-2], "eval.samples_per_prompt=256", f"log.folder={tmp_path}"]
    process = start("eval", "--model", "configs/model/tiny", *words)

    def answering() -> list[psutil.Process]:
        family = psutil.Process(process.pid).children(recursive=True)
        return [p for p in family if "".join(p.cmdline()).startswith("ray::EngineRank.poll")]

    wait_for(lambda: bool(answering()), process)
    family = psutil.Process(process.pid).children(recursive=True)
    answering()[0].kill()
    cause = "no sign of life from engine 0 rank 0"
    assert cause in ended(process, 60).splitlines()[-1] and process.returncode == 1
    [folder] = tmp_path.iterdir()
    assert cause in json.loads((folder / "summary.json").read_text())["error"]
    assert left(family, 5) == []
