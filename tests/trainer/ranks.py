"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from miles_lite.parallel import ParallelDims

MAX_LAYOUTS = 16  # of one call


@dataclass
class World:
    """What a rank's function is given: who it is, and how to take up one layout after another."""

    rank: int
    size: int
    ports: list[int]
    timeout_s: float = 60.0  # of one collective
    _next: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self._next = iter(self.ports)

    @contextmanager
    def layout(self, dims: ParallelDims) -> Iterator[None]:
        """All ranks at once: process groups of `dims` for the body."""
        from miles_lite.trainer.megatron import setup

        assert dims.world_size == self.size, f"{dims} does not make {self.size} ranks"
        setup.init(self.rank, f"127.0.0.1:{next(self._next)}", dims, 1234, self.timeout_s)
        try:
            yield
        finally:
            setup.destroy()


def run_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, deadline_s: float = 200.0
) -> list[Any]:
    """[fn(world, *args) of rank 0, ...]. `fn` is a module-level function; results are pickled.

    The first exception of a rank is raised here with its traceback, and all ranks are ended; so
    are they when not all have answered within `deadline_s`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.warm"])
    results = context.Queue()
    ports = _free_ports(MAX_LAYOUTS)
    ranks = [
        # not daemons: checkpointing starts processes of its own
        context.Process(target=_work, args=(World(r, num_ranks, ports), results, fn, args))
        for r in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        found = _collect(results, ranks, time.monotonic() + deadline_s)
        for process in ranks:
            process.join(10.0)
        return found
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _work(world: World, results: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import tests.trainer.warm  # noqa: F401 (already there, unless the server could not find it)

    try:
        results.put((world.rank, True, fn(world, *args)))
    except BaseException:
        results.put((world.rank, False, traceback.format_exc()))


def _collect(results: Any, ranks: list[Any], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, good, value = results.get(timeout=1.0)
        except queue.Empty:
            late = [r for r in range(len(ranks)) if r not in found]
            dead = [r for r in late if ranks[r].exitcode is not None]
            if dead and results.empty():
                raise RuntimeError(
                    f"ranks {dead} died with exit codes {[ranks[r].exitcode for r in dead]}"
                ) from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from ranks {late}") from None
            continue
        if not good:
            raise RuntimeError(f"rank {rank} failed:\n{value}")
        found[rank] = value
    return [found[rank] for rank in range(len(ranks))]


def _free_ports(count: int) -> list[int]:
    """Below the range from which the system hands out ports: gloo's own connections, made between
    this choice and its use, would now and then take one of them."""
    free: list[int] = []
    while len(free) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in free:
            free.append(port)
    return free
