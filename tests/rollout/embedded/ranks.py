"""Engines of several processes. Imports no transformers, so that the processes start quickly."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank


def _serve(pipe: Connection) -> None:
    """Answer (method, args) with what the current engine rank returns or raises."""
    torch.set_num_threads(1)
    rank: EngineRank | None = None
    while True:
        method, args = pipe.recv()
        try:
            if method == "new":
                rank = EngineRank(*args)
                answer = None
            elif method == "sabotage":  # the next forward pass of this rank fails
                rank.model.forward = _broken
                answer = None
            elif method == "filled":  # a copy of a parameter, by value
                answer = rank.tensor(*args).numpy()
            else:
                answer = getattr(rank, method)(*args)
        except Exception as error:
            answer = error
        pipe.send(answer)


def _broken(*_: Any) -> None:
    raise ZeroDivisionError("sabotaged")


class Pool:
    """Processes that play the ranks of one engine after the other."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.dims = EngineDims(tp=0, dp=1, ep=1)

    def start(
        self, model: NemotronH, dims: EngineDims, options: EngineOptions, folder: Path
    ) -> None:
        """A new engine on the first dims.tp processes, weights loaded, ready to generate."""
        self.dims = dims
        self._finish([(rank, "new", (model, dims, rank, options)) for rank in range(dims.tp)])
        address = self.call(0, "listen", "127.0.0.1")
        for method, args in [
            ("connect", (address,)),
            ("load_hf", (folder,)),
            ("set_version", (0,)),
            ("enter", (Phase.generate,)),
        ]:
            self.call_all(method, *args)

    def call(self, rank: int, method: str, *args: Any) -> Any:
        return self._finish([(rank, method, args)])[0]

    def call_all(self, method: str, *args: Any) -> list[Any]:
        return self._finish([(rank, method, args) for rank in range(self.dims.tp)])

    def _finish(self, calls: Sequence[tuple[int, str, tuple[Any, ...]]]) -> list[Any]:
        for rank, method, args in calls:
            self.pipes[rank].send((method, args))
        answers = []
        for rank, method, _ in calls:
            assert self.pipes[rank].poll(60), f"rank {rank} does not answer {method}"
            answers.append(self.pipes[rank].recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
