"""One process of an embedded engine: its weights, its caches, its part of serving."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from miles_lite.cluster.lease import RESIDENT, resident_bytes
from miles_lite.cluster.rendezvous import TCPStore, open_store
from miles_lite.cluster.roll import Here
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Bucket, Hosted, Phase
from miles_lite.rollout.embedded.cache import Cache
from miles_lite.rollout.embedded.comm import Comms
from miles_lite.rollout.embedded.model import Model
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.serve import ABORT, STOP, Done, Listener, Server
from miles_lite.types import Request
from miles_lite.weights.hf import HfCheckpoint
from miles_lite.weights.plan import Route
from miles_lite.weights.transport import Inbox


class EngineRank:
    """Life: listen (rank 0), connect (all), weights, enter(generate), submit and poll (rank 0), ...

    Methods may be called from several threads: poll waits while others go on.
    """

    def __init__(self, model: NemotronH, dims: EngineDims, rank: int, options: EngineOptions):
        self.config, self.dims, self.rank, self.options = model, dims, rank, options
        self.here = Here()
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.model = Model(model, dims, rank, self.dtype)
        self.model.allocate(self.device)
        self.server = Server(self.model, dims, rank, options)
        self._store: TCPStore | None = None

    def listen(self, host: str) -> str:
        """Open the meeting point on rank 0 at a free port. Returns the address for connect."""
        self._store = open_store(host, 0, True, self.options.timeout_s)
        return f"{host}:{self._store.port}"

    def follow(self, listener: Listener) -> None:
        """Before connect: tell it every token as it is drawn. There is then nothing to poll."""
        if self.dims.dp > 1:
            raise ValueError(f"dp = {self.dims.dp}: rank 0 draws for its own group only")
        self.server.listener = listener

    def connect(self, address: str) -> None:
        """Meet the other ranks at host:port and begin to serve. All ranks call it together."""
        if self._store is None and self.dims.tp > 1:
            host, port = address.rsplit(":", 1)
            self._store = open_store(host, int(port), self.rank == 0, self.options.timeout_s)
        self.server.start(Comms(self.dims, self.rank, self._store, self.options), self._store)
        gc.freeze()  # what is here stays: no collection of a step's garbage need look at it

    def num_steps(self) -> int:
        """That the model has made: requests under way are getting on. Never waits."""
        return self.server.num_steps

    # --- serving, rank 0 only ---

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests, as one event of the schedule. ValueError for one that can never fit."""
        for request in requests:
            self.options.check(request, self.config)
        if self.server.cache is None:
            raise RuntimeError(f"engine rank {self.rank} takes requests in Phase.generate only")
        self.server.put(list(requests))

    def poll(self, max_wait_s: float) -> Done:
        """(uid, completion) of what finished since the last call; waits for at least one."""
        return self.server.take(max_wait_s)

    def cancel(self, uids: Iterable[int]) -> None:
        """End these requests, which come out with Finish.abort unless they are over already."""
        self.server.put(frozenset(uids))

    def abort(self) -> None:
        """End everything submitted so far; it comes out of poll with Finish.abort."""
        self.server.put(ABORT)

    def close(self) -> None:
        """End serving on all ranks; called on all, rank 0 tells the others."""
        if self.rank == 0:
            self.server.put(STOP)
        self.server.join(self.options.timeout_s)

    # --- memory ---

    def enter(self, phase: Phase) -> dict[str, int]:
        """Take or drop caches, and on a GPU weights; `held_bytes` then. Waits for the end of
        requests under way."""
        self.here.phase = phase.value
        with self.server.paused():
            if phase is Phase.generate:
                if self.server.version < 0:
                    raise RuntimeError(f"engine rank {self.rank} was never sent weights")
                if self.server.cache is None:
                    slots = (self.options.max_running, self.options.max_seq_len)
                    self.server.cache = Cache(
                        self.config, self.dims, slots, self.dtype, self.device
                    )
                return self.held_bytes()
            self.server.cache = None
            if phase is Phase.sync and not self.model.weights:
                self.model.allocate(self.device)
            # on a CPU the device is the host, where weights stay anyway
            if phase is Phase.train and self.device.type == "cuda":
                self.model.drop()
                self.server.version = -1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self.held_bytes()

    def held_bytes(self) -> dict[str, int]:
        cache = self.server.cache
        return {
            "weights": sum(tensor.nbytes for tensor in self.model.weights.values()),
            "cache": cache.num_bytes if cache else 0,
            RESIDENT: resident_bytes(),
        }

    # --- weights ---

    def hosted(self) -> list[Hosted]:
        """Covers every row of every parameter and buffer of this rank exactly once."""
        return [hosted for param in self.model.params for hosted in param.hosted]

    def tensor(self, param: str) -> Tensor:
        """The live storage of a parameter. Valid until the next enter(Phase.train)."""
        return self.model.weights[param]

    def set_routes(self, routes: Sequence[Route]) -> None:
        """Once, before the first sync: the copies that will come, by trainer rank."""
        self._inbox = Inbox(
            f"engine rank {self.rank}", self.tensor, {r.source: r for r in routes}, self.dtype
        )

    def load_bucket(self, source: int, number: int, bucket: Bucket) -> None:
        """Copy bucket `number` of trainer rank `source` into the live weights."""
        self._inbox.load(source, number, bucket)

    def finish_sync(self) -> dict[int, list[int]]:
        """All has arrived? Returns checksums of the live weights by source."""
        return self._inbox.finish()

    def set_version(self, version: int) -> None:
        """Weights are complete; completions carry `version` from now on."""
        with self.server.paused():
            self.server.version = version

    def load_hf(self, folder: Path) -> None:
        """Fill all weights from the safetensors of an HF checkpoint."""
        checkpoint = HfCheckpoint(folder)
        for hosted in self.hosted():
            target = self.tensor(hosted.param)
            target = target if hosted.index < 0 else target[hosted.index]
            target.copy_(checkpoint.read_hosted(hosted))
