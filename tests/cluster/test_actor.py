"""Remote calls through a real Ray: every failure names the rank and the operation, in time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import ray

from miles_lite.cluster import CPU_DEVICE, roll
from miles_lite.cluster.actor import Remote, RemoteError, call_all, spawn, waited_for
from miles_lite.cluster.placement import Bundle, reserve
from miles_lite.cluster.session import open_session
from miles_lite.config import ClusterConfig


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pid(self) -> int:
        return os.getpid()

    def threads(self) -> str:
        return os.environ["OMP_NUM_THREADS"]

    def sleep(self, seconds: float) -> int:
        if self.rank == 1:
            time.sleep(seconds)
        return self.rank

    def fail(self) -> None:
        if self.rank == 1:
            raise ValueError("seven is not prime enough")
        time.sleep(30)

    def meet(self, port: int) -> int:
        """Join a process group; ranks write on the board from now on, of this file."""
        roll.OURS = __name__
        self.here = roll.Here()
        self.here.phase = "train"
        from torch.distributed import ProcessGroupGloo

        from miles_lite.cluster.rendezvous import open_store

        store = open_store("127.0.0.1", port, False, 20.0)
        self.group = ProcessGroupGloo(store, self.rank, 3, timedelta(seconds=60))
        return os.getpid()

    def update(self, dawdler: int) -> None:
        """One collective, for which a rank may come late."""
        if self.rank == dawdler:
            self.dawdle()
        from torch import ones

        self.group.allreduce([ones(1)]).wait()

    def dawdle(self) -> None:
        time.sleep(10)


@pytest.fixture(scope="module")
def bundles() -> Iterator[list[Bundle]]:
    with open_session(ClusterConfig(device="cpu", start_timeout_s=60), 3, "cpu") as reserved:
        yield reserved


@pytest.fixture
def ranks(bundles: list[Bundle]) -> Iterator[list[Remote]]:
    made = [
        spawn(
            Rank,
            f"test rank {i}",
            i,
            bundle=bundle,
            share=0.4,
            threads=2,
            env={"OMP_NUM_THREADS": "1"},
        )
        for i, bundle in enumerate(bundles)
    ]
    yield made
    for remote in made:
        remote.kill()


def test_results_come_in_rank_order(ranks: list[Remote]) -> None:
    assert call_all(ranks, "sleep", 0.2, deadline_s=60) == [0, 1, 2]
    assert call_all(ranks, "threads", deadline_s=60) == ["1"] * 3


def test_a_deadline_names_who_is_late(ranks: list[Remote]) -> None:
    call_all(ranks, "pid", deadline_s=60)
    begin = time.monotonic()
    said: list[str] = []
    listener = threading.Timer(0.7, lambda: said.append(waited_for()))
    listener.start()
    with pytest.raises(RemoteError, match=r"'sleep' within 1 s from: test rank 1$"):
        call_all(ranks, "sleep", 30.0, deadline_s=1)
    assert time.monotonic() - begin < 20
    listener.join()
    assert said == ["waiting for test rank 1"] and waited_for() == ""


def test_the_first_failure_ends_the_wait_and_is_named(ranks: list[Remote]) -> None:
    call_all(ranks, "pid", deadline_s=60)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"test rank 1 failed in 'fail': .*not prime enough"):
        call_all(ranks, "fail", deadline_s=60)
    assert time.monotonic() - begin < 30


def test_a_killed_rank_is_named(ranks: list[Remote]) -> None:
    pids = call_all(ranks, "pid", deadline_s=60)
    os.kill(pids[2], signal.SIGKILL)
    with pytest.raises(RemoteError, match=r"test rank 2 died, asked for 'pid': process \d+: "):
        call_all(ranks, "pid", deadline_s=60)


def test_calls_from_an_event_loop(ranks: list[Remote]) -> None:
    async def both() -> list[int]:
        return await asyncio.gather(
            *(rank.call_async("sleep", 0.1, deadline_s=60) for rank in ranks)
        )

    assert asyncio.run(both()) == [0, 1, 2]
    with pytest.raises(RemoteError, match="test rank 1"):
        asyncio.run(ranks[1].call_async("sleep", 30.0, deadline_s=1))


def test_more_devices_than_there_are(bundles: list[Bundle]) -> None:
    with pytest.raises(ValueError, match=r"9 devices wanted .* sees 3"):
        reserve(9, CPU_DEVICE, 5)


def test_who_does_not_arrive_in_a_collective_is_named(ranks: list[Remote]) -> None:
    """To the driver and in the log of every other rank."""
    from miles_lite.cluster.rendezvous import open_store

    store = open_store("127.0.0.1", 0, True, 20.0)
    pids = call_all(ranks, "meet", store.port, deadline_s=60)
    call_all(ranks, "update", -1, deadline_s=60)
    late = r"no answer to 'update' within 2 s from: "
    late += r"test rank 1 \(in train: Rank.update > Rank.dawdle\), "
    late += "for which test rank 0, test rank 2 wait in train: Rank.update"
    with pytest.raises(RemoteError, match=late):
        call_all(ranks, "update", 1, deadline_s=2)
    call_all(ranks, "pid", deadline_s=60)  # it came in the end
    time.sleep(2 * roll.BEAT_S)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # pyright: ignore
    for pid in pids:
        (log,) = logs.glob(f"worker-*-{pid}.err")
        assert re.search(late + "; here: train: Rank.update", log.read_text())

    os.kill(pids[2], signal.SIGSTOP)
    stopped = r"from: test rank 2 \(silent since [\d:]+, then in train: .*\), "
    with pytest.raises(RemoteError, match=stopped + "for which test rank 0, test rank 1 wait in"):
        call_all(ranks, "update", -1, deadline_s=2)
    os.kill(pids[2], signal.SIGCONT)
    call_all(ranks, "pid", deadline_s=60)

    threading.Timer(1.0, lambda: os.kill(pids[1], signal.SIGKILL)).start()
    with pytest.raises(RemoteError, match=rf"test rank 1 died, .*: process {pids[1]}: "):
        call_all(ranks, "update", 1, deadline_s=60)  # its neighbours saw broken connections


ALL = ("a", "b", "c")


def note(beat: int, place: str = "step", waits: bool = False) -> roll.Note:
    return roll.Note(beat, "12:00:00", "train", place, waits)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ((None, None, None), ""),
        ((note(2, waits=True), note(1), None), "b (silent since 12:00:00, then in train: step), "
         "c (never heard), for which a wait in train: step"),
        ((note(2), note(2), note(2, "save")), "a (in train: step), b (in train: step), "
         "c (in train: save)"),
        ((note(2, waits=True), note(2, waits=True), note(2, "")), "c (in train: asked for nothing),"
         " for which a, b wait in train: step"),
    ],
)  # fmt: skip
def test_who_stands_out(now: tuple[roll.Note | None, ...], told: str) -> None:
    before = dict.fromkeys(ALL, note(1)) | {"c": None}
    assert roll.absence(ALL, before, dict(zip(ALL, now, strict=True))).told == told


def test_one_that_was_not_asked_may_be_who_is_missing() -> None:
    now = {"a": note(2, waits=True), "b": note(1)}
    assert roll.absence(["a"], dict.fromkeys("ab", note(1)), now).names == ["b"]
