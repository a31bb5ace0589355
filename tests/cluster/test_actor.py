"""Remote calls through a real Ray: every failure names the rank and the operation, in time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from miles_lite.cluster import CPU_DEVICE
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
    assert time.monotonic() - begin < 5
    listener.join()
    assert said == ["waiting for test rank 1"] and waited_for() == ""


def test_the_first_failure_ends_the_wait_and_is_named(ranks: list[Remote]) -> None:
    call_all(ranks, "pid", deadline_s=60)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"test rank 1 failed in 'fail': .*not prime enough"):
        call_all(ranks, "fail", deadline_s=60)
    assert time.monotonic() - begin < 10


def test_a_killed_rank_is_named(ranks: list[Remote]) -> None:
    pids = call_all(ranks, "pid", deadline_s=60)
    os.kill(pids[2], signal.SIGKILL)
    with pytest.raises(RemoteError, match=r"test rank 2 failed in 'pid'"):
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
