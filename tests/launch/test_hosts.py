"""Runs over several hosts, started by the very scripts: who comes late, never, or dies."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from miles_lite.chaos.processes import members
from miles_lite.environment import PROJECT
from miles_lite.run import read_metrics
from tests.launch.hosts import Host, Job, make_hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

SMALL = """
train.num_steps=2 rollout.num_prompts=8 rollout.samples_per_prompt=4 train.global_batch=32
checkpoint.every=1
""".split()
SCRIPT = "scripts/run-ultra.sh"


@pytest.fixture
def two() -> Iterator[list[Host]]:
    with make_hosts(2) as hosts:
        yield hosts


def head(host: Host, folder: Path, *overrides: str, **env: str) -> Job:
    words = ["bash", SCRIPT, "head", host.address, f"log.folder={folder}", *SMALL, *overrides]
    return host.start(_log(folder, host), *words, **{"EXPERIMENT": "tiny", "NUM_NODES": "2", **env})


def worker(host: Host, folder: Path, address: str = "10.77.0.1", **env: str) -> Job:
    return host.start(_log(folder, host), "bash", SCRIPT, "worker", address, **env)


def _log(folder: Path, host: Host) -> Path:
    return folder / f"{host.name}-{len(host.processes)}.log"


def steps(folder: Path) -> list[int]:
    found = read_metrics(folder / "tiny")
    return [step for step, metrics in found.items() if "train/loss" in metrics]


def test_a_worker_that_comes_late(two: list[Host], tmp_path: Path) -> None:
    first, second = two
    lead = head(first, tmp_path, "parallel.tp=2", "parallel.dp=1")
    lead.wait_for("waiting for hosts")
    assert "missing: 1 of 2 hosts; here: node1 (10.77.0.1)" in lead.text()
    assert "6379" in lead.text()  # of the map

    again = head(first, tmp_path).end(2)
    assert "a Ray runs here already" in again
    elsewhere = head(second, tmp_path).end(2)  # of the same run
    assert "is being trained by process" in elsewhere and "on node1" in elsewhere
    at_home = worker(first, tmp_path).end(2)
    assert "10.77.0.1 is an address of this very host" in at_home
    second.output("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))  # a folder of its own
    blind = worker(second, tmp_path).end(2, 30)
    second.output("umount", str(tmp_path))
    assert f"what the head writes to {tmp_path}/tiny cannot be seen here" in blind
    assert "node2 (10.77.0.2) cannot join: what the head writes" in lead.text()

    job = worker(second, tmp_path)
    lead.end(0)
    assert "the run ended: it has finished" in job.end(0, 60)
    assert steps(tmp_path) == [0, 1]
    assert read_metrics(tmp_path / "tiny")[0]["sync/relayed_bytes"] > 0  # hosts share no memory
    assert first.left() == second.left() == []
    assert not (tmp_path / "tiny/.ray-token").exists()
    third = worker(second, tmp_path, WAIT_S="2").end(2)  # its head has gone
    assert "no head at 10.77.0.1:6380 within 2 s" in third and "no head runs on it" in third


def test_ctrl_c_while_hosts_are_awaited(two: list[Host], tmp_path: Path) -> None:
    first, second = two
    alone = worker(second, tmp_path)
    alone.wait_for("waiting for the head at 10.77.0.1:6380")
    alone.signal()
    assert "interrupted" in alone.end(130, 20)

    lead = head(first, tmp_path, NODES="10.77.0.1,10.77.0.9")
    lead.wait_for("missing: 10.77.0.9")
    job = worker(second, tmp_path)
    assert "it is none of the hosts of this run: 10.77.0.1, 10.77.0.9" in job.end(2, 20)
    lead.signal()
    assert "interrupted" in lead.end(130, 120)
    assert first.left() == second.left() == []


def test_hosts_that_never_come(tmp_path: Path) -> None:
    with make_hosts(3) as (first, second, stranger):
        nodes = "10.77.0.1,10.77.0.2,10.77.0.3,10.77.0.4"
        layout = ["parallel.dp=4", "parallel.ep=2"]
        lead = head(first, tmp_path, *layout, NODES=nodes, WAIT_S="45")
        job = worker(second, tmp_path)
        job.wait_for("ready")
        lead.wait_for("missing: 10.77.0.3, 10.77.0.4; here: node1 (10.77.0.1), node2 (10.77.0.2)")

        other = tmp_path / "checkout"  # with one value changed
        for name in ("miles_lite", "configs", "rewards", "scripts"):
            shutil.copytree(PROJECT / name, other / name)
        with (other / "configs/algo/grpo.yaml").open("a") as file:
            file.write("# changed\n")
        words = ["bash", str(other / SCRIPT), "worker", first.address]
        python = str(PROJECT / ".venv/bin/python")
        refused = stranger.start(tmp_path / "other.log", *words, PYTHON=python).end(2)
        assert "other code than the head's: configs/algo/grpo.yaml; bring both" in refused
        assert "refused node3 (10.77.0.3): other code" in lead.text()
        nowhere = worker(stranger, tmp_path, "192.168.7.1").end(2, 20)  # at once: no way there
        assert "this host has 10.77.0.3 (eth0)" in nowhere

        second.cut()
        assert "the head 10.77.0.1 was silent for 30 s: this worker has left" in job.end(2, 120)
        text = lead.end(2, 120)
        assert "lost node2 (10.77.0.2): it was silent for 30 s; it may come again" in text
        assert "missing: 10.77.0.2, 10.77.0.3, 10.77.0.4; here: node1 (10.77.0.1)" in text
        assert first.left() == second.left() == stranger.left() == []


def test_head_and_worker_die_and_the_run_goes_on(two: list[Host], tmp_path: Path) -> None:
    first, second = two
    more = ["train.num_steps=60"]
    lead, job = head(first, tmp_path, *more), worker(second, tmp_path)
    lead.wait_for("step_000002")
    lead.signal(signal.SIGKILL)
    assert "the head 10.77.0.1 closed the connection" in job.end(2, 120)
    lead.process.wait(20)
    _wait_empty(first)
    assert second.left() == []

    lead, job = head(first, tmp_path, *more), worker(second, tmp_path)
    lead.wait_for("step_000004")
    below = members(psutil.Process(lead.process.pid))
    [driver] = [member.process for member in below if member.kind == "driver"]
    driver.kill()  # all hosts are there, and stay
    lead.wait_for("restart 1, in 1 s: after")
    lead.wait_for(f"saved {tmp_path}/tiny/checkpoints/step_{max(steps(tmp_path)) + 3:06}")
    job.signal(signal.SIGKILL)
    text = lead.end(1)
    assert "lost node2 (10.77.0.2): it closed the connection; ending the run" in text
    assert "last time there was" not in text
    assert first.left() == []
    _wait_empty(second)

    done = max(steps(tmp_path)) + 1
    lead = head(first, tmp_path, f"train.num_steps={done + 2}")
    lead.wait_for("missing: 1 of 2 hosts (last time there was node2 (10.77.0.2))")
    job = worker(second, tmp_path)
    lead.end(0)
    job.end(0, 60)
    assert f"step {done + 2}/{done + 2}: reward" in lead.text()
    assert f"step {done - 1}/{done + 2}: reward" not in lead.text()  # it was saved
    assert steps(tmp_path) == list(range(done + 2))


def test_four_hosts_and_ctrl_c(tmp_path: Path) -> None:
    with make_hosts(4) as (first, *others):
        layout = "parallel.tp=2 parallel.dp=2 parallel.ep=4 rollout.engine.tp=4".split()
        layout += ["rollout.engine.dp=2", "rollout.engine.ep=4", "train.num_steps=60"]
        jobs = [worker(host, tmp_path) for host in others]
        lead = head(first, tmp_path, *layout, NUM_NODES="4")
        lead.wait_for("step_000001")
        lead.signal()
        text = lead.end(130)
        assert "stopped by SIGINT, all of it saved" in text
        for job in jobs:
            assert "the run ended: the driver ended with status 130" in job.end(130, 60)
        assert [host.left() for host in (first, *others)] == [[], [], [], []]
        assert steps(tmp_path)[-1] < 59


def _wait_empty(host: Host) -> None:
    """What was killed takes a moment to be gone, but goes by itself."""
    for _ in range(100):
        if not host.left():
            return
        time.sleep(0.2)
    raise AssertionError(host.left())
