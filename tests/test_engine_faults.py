"""Engines that die, hang or answer nonsense, as real processes, in every phase: the samples of the
step are to the bit those of an undisturbed one."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from miles_lite import build
from miles_lite.build import Parts
from miles_lite.compose import compose
from miles_lite.protocols import Phase
from miles_lite.rollout.revival import Revival
from miles_lite.types import Prompt, Sample
from miles_lite.weights.transport import Inbox

STALL_S = 4.0
SYNC_S = 5.0
VERSION = 3  # of weights that nobody trains: every draw is the same
WORDS = [
    "experiment=tiny",
    "parallel.dp=4",
    "rollout.engine.num_engines=2",  # of two processes each
    f"rollout.engine.stall_s={STALL_S:g}",
    f"sync.timeout_s={SYNC_S:g}",
    "sync.bucket_bytes=65536",
]

pytestmark = pytest.mark.slow


class Again:
    """The same prompts every time."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def take(self, n: int) -> list[Prompt]:
        return self.prompts[:n]

    def put_back(self, n: int) -> None: ...


Act = Callable[[Any], Any]  # on the EngineRank of a process, in that process


@dataclass(frozen=True)
class Fault:
    engine: int
    rank: int
    act: Act
    cause: str  # as it is told
    limit_s: float  # until it is noticed


class Trial:
    def __init__(self, parts: Parts, prompts: list[Prompt], folder: Path) -> None:
        self.rollout, self.devices = parts.rollout, Revival(parts.trainer, parts.rollout)
        self.prompts, self.folder = Again(prompts), folder
        self.devices.enter(Phase.sync)
        self.devices.send_weights(VERSION)
        self.expected = self.draw()
        places = itertools.product(range(2), range(2))
        self.pids = [self.call(*place, lambda _: os.getpid()) for place in places]

    def draw(self) -> list[Sample]:
        self.devices.enter(Phase.generate)
        drawn = self.rollout.generate(self.prompts).groups
        return [sample for group in drawn for sample in group.samples]

    def call(self, engine: int, rank: int, act: Act) -> Any:
        handle = self.rollout.engines[engine].receivers()[rank].handle
        return ray.get(handle.__ray_call__.remote(act), timeout=60)

    def plant(self, fault: Fault, when: Callable[[Any, Act], None]) -> Path:
        """Returns the file in which the process writes when it happens."""
        stamp = self.folder / f"stamp-{time.monotonic_ns()}"

        def stamped(rank: Any) -> None:
            stamp.write_text(str(time.time()))
            fault.act(rank)

        self.call(fault.engine, fault.rank, lambda rank: when(rank, stamped))
        return stamp


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder: Path = tmp_path_factory.mktemp("faults")
    cfg = compose([*WORDS, f"log.folder={folder}"])
    with build.start(cfg, build.read(cfg), folder) as parts:
        yield Trial(parts, parts.prompts.take(cfg.rollout.num_prompts), folder)


def check(caplog: pytest.LogCaptureFixture, faults: Sequence[Fault], stamps: list[Path]) -> None:
    """Each was noticed in time, and its cause was told."""
    told = [r for r in caplog.records if r.getMessage().startswith("restarting engine")]
    for fault, stamp in zip(faults, stamps, strict=True):
        name = f"engine {fault.engine}"
        [restart] = [r for r in told if r.getMessage().startswith(f"restarting {name}:")]
        assert re.search(fault.cause, restart.getMessage())
        noticed = [r for r in caplog.records if r.getMessage().startswith(name)]
        seconds = (noticed or [restart])[0].created - float(stamp.read_text())
        print(f"NOTICED after {seconds:.1f} s: {restart.getMessage()[:250]}")
        assert seconds < fault.limit_s


# ------------------------------------------------------------------ what happens, and when


def die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(_: Any) -> None:
    time.sleep(1e6)


def spoil(rank: Any) -> None:
    for weight in rank.model.weights.values():
        weight.fill_(float("nan"))


def lie(rank: Any) -> None:
    rank.server.version += 1


def in_a_step(rank: Any, act: Act) -> None:
    """On the serving thread, in the middle of the answers."""
    forward, calls = rank.model.forward, itertools.count()

    def tenth(*args: Any) -> Any:
        if next(calls) == 10:
            act(rank)
        return forward(*args)

    rank.model.forward = tenth


def in_a_sync(rank: Any, act: Act) -> None:
    load, calls = Inbox.load, itertools.count()

    def third(inbox: Inbox, *bucket: Any) -> None:
        if next(calls) == 2:
            act(rank)
        load(inbox, *bucket)

    Inbox.load = third


AT_ONCE = 3.0  # on a machine with other work
ROLL_S = 12.0  # besides a deadline, for the roll call that finds who lags
STALLED = 1.25 * STALL_S + 4
PAIRS = {
    "killed and stopped": [
        Fault(0, 1, die, "no sign of life from engine 0 rank 1", AT_ONCE),
        Fault(1, 0, stop, "no answer to 'poll' .* from: engine 1 rank 0", STALLED),
    ],
    "stale and stopped": [
        Fault(0, 0, lie, "of version 4; the policy is at version 3", AT_ONCE),
        Fault(1, 1, stop, "no step .* no sign of life from engine 1 rank 1", STALLED),
    ],
    "spoilt and stuck": [
        Fault(0, 0, spoil, "logits of request .* are not finite", AT_ONCE),
        Fault(1, 1, hang, "no step for .* requests under way$", STALLED),
    ],
}


@pytest.mark.parametrize("faults", PAIRS)
def test_in_the_middle_of_answers(
    trial: Trial, caplog: pytest.LogCaptureFixture, faults: str
) -> None:
    trial.devices.metrics()
    trial.devices.enter(Phase.generate)
    stamps = [trial.plant(fault, in_a_step) for fault in PAIRS[faults]]
    assert trial.draw() == trial.expected
    check(caplog, PAIRS[faults], stamps)
    metrics = trial.devices.metrics()
    assert metrics["perf/engine_restarts"] == 2
    assert metrics["perf/engine_recovery_time"] > 1
    print("RECOVERED in", metrics["perf/engine_recovery_time"])


def test_while_idle_and_in_the_middle_of_a_sync(
    trial: Trial, caplog: pytest.LogCaptureFixture
) -> None:
    idle = Fault(0, 1, hang, "no answer to 'enter' .* from: engine 0 rank 1", STALL_S + ROLL_S)
    syncing = Fault(1, 0, stop, "'load_bucket' .* from: engine 1 rank 0", SYNC_S + ROLL_S)
    trial.devices.metrics()
    trial.devices.enter(Phase.train)
    begin = time.time()
    pid = trial.call(0, 1, lambda _: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    stamps = [trial.folder / "idle"]
    stamps[0].write_text(str(begin))
    trial.devices.enter(Phase.sync)
    stamps.append(trial.plant(syncing, in_a_sync))
    trial.devices.send_weights(VERSION)
    check(caplog, [idle, syncing], stamps)
    assert trial.draw() == trial.expected
    assert not any(psutil.pid_exists(pid) for pid in trial.pids)
