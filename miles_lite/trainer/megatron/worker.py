"""One trainer rank: what the trainer group may ask of it. Lives in a Ray actor."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_lite import log
from miles_lite.cluster.lease import RESIDENT, resident_bytes
from miles_lite.cluster.rendezvous import open_store
from miles_lite.cluster.roll import Here
from miles_lite.intact import file_digest, writing
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.orphan import bind_forks
from miles_lite.protocols import Hosted, Phase, TokenValues
from miles_lite.trainer.megatron import setup
from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.types import MicroBatch
from miles_lite.weights.checksum import checksum
from miles_lite.weights.hf import HfCheckpoint, HfWriter
from miles_lite.weights.sender import Itinerary, Sender, SyncReport
from miles_lite.weights.table import iter_segments, trainer_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MegatronWorker:
    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        log.setup("trainer", rank)
        self._here = Here()
        bind_forks()  # Megatron forks writers of checkpoints, which wait for theirs for ever
        # of every rank, at every start: what is not installed, what torch will rename one day
        warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._spec = spec
        self._rank = rank
        self._device = (
            torch.device(spec.device, 0) if spec.device == "cuda" else torch.device("cpu")
        )
        self._dtype = DTYPES[spec.dtype]
        self._model = NemotronH.from_folder(spec.model_path)
        self._hosted = trainer_layout(self._model, spec.dims, rank)
        self._sender = Sender(rank, lambda name: self._weights[name], self._dtype, self._device)
        self._store: Any = None  # rank 0's, once it listens

    def listen(self, host: str) -> str:
        """On rank 0: open the place where all ranks meet. Returns its address."""
        self._store = open_store(host, 0, True, self._spec.train.timeout_s)
        return f"{host}:{self._store.port}"

    def setup(self, address: str) -> None:
        """Join the group at `address`, build the model, load HF weights, make the optimizer."""
        spec = self._spec
        setup.init(self._rank, address, spec.dims, spec.seed, spec.train.timeout_s, self._store)
        # these modules import megatron, which must see the CPU look-alikes installed by `init`
        from miles_lite.trainer.megatron import memory, optimizer, replay, step
        from miles_lite.trainer.megatron.model import build_model, named_weights, transformer_config

        config = transformer_config(
            self._model,
            spec.dims,
            self._dtype,
            spec.train.megatron,
            spec.algo.routing_replay,
        )
        module = build_model(self._model, config)
        self._weights = named_weights(module)
        self._load(HfCheckpoint(spec.model_path))
        ddp = optimizer.wrap_ddp(module)
        # Megatron's buffers took the parameters over: the names must point at the live storage
        self._weights = named_weights(ddp.module)
        self._optimizer = optimizer.Optimizer(ddp, spec.optim, self._dtype)
        self._optimizer.reload_masters()
        self._memory = memory.DeviceMemory(ddp, self._device, self._optimizer.storages)
        self._ddp = ddp
        self._reference: list[torch.Tensor] = []
        if spec.algo.needs_reference:
            self._reference = [p.data.to("cpu", copy=True) for p in ddp.module.parameters()]
        settings = step.Settings(spec.algo, spec.temperature, spec.train.logprob_chunk_tokens)
        routing = replay.RoutingReplay(ddp.module, self._model, self._device)
        self._step = step.Step(
            ddp, self._optimizer, routing, settings, self._reference, self._device
        )
        gc.freeze()  # what is here stays: no collection of a step's garbage need look at it

    def _load(self, checkpoint: HfCheckpoint) -> None:
        """Fill every parameter and buffer; the table and the live model must name the same ones."""
        planned = {hosted.param for hosted in self._hosted}
        if planned != set(self._weights):
            raise ValueError(
                f"rank {self._rank}: weight table and live model differ; only in the table: "
                f"{sorted(planned - set(self._weights))[:5]}, only in the model: "
                f"{sorted(set(self._weights) - planned)[:5]}"
            )
        with torch.no_grad():
            for hosted in self._hosted:
                live, loaded = self._weights[hosted.param], checkpoint.read_hosted(hosted)
                if live.shape != loaded.shape:
                    raise ValueError(
                        f"{hosted.param}: the model has shape {tuple(live.shape)}, the checkpoint "
                        f"gives {tuple(loaded.shape)}"
                    )
                live.copy_(loaded)

    # ------------------------------------------------------------------ training

    def step(self, share: Any) -> Any:
        """Train on this rank's share of the batch ([update][micro-batch]); returns a RankReport."""
        return self._step(share)

    def refresh_reference(self) -> None:
        self._step.refresh_reference()

    def enter(self, phase: Phase) -> dict[str, int]:
        """Free or take memory as `phase` says; bytes held afterwards by kind."""
        self._here.phase = phase.value
        self._memory.enter(phase)
        return self.held_bytes()

    def held_bytes(self) -> dict[str, int]:
        return self._memory.held_bytes() | {RESIDENT: resident_bytes()}

    def score(self, micro_batches: Sequence[MicroBatch]) -> TokenValues:
        """Sample -> log-probs of its response tokens now. Only ranks that compute losses know."""
        return self._step.score(micro_batches)

    def look_inside(
        self, micro_batch: MicroBatch
    ) -> tuple[np.ndarray, list[torch.Tensor], list[float]]:
        """See Step.look_inside."""
        return self._step.look_inside(micro_batch)

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write this rank's part of a checkpoint into a folder that is there and empty.

        Asynchronously, the state of this moment is written by a process forked off, until
        `finish_save`.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        from miles_lite.trainer.megatron import checkpoint

        self._memory.take_optimizer()
        writer = checkpoint.Writer(asynchronous)
        self._writing = lambda: writing(folder, CheckpointException)
        with self._writing():
            checkpoint.save(folder, self._ddp, self._optimizer, self._reference, writer)
        self._writer = writer

    def finish_save(self) -> None:
        """Collective: all ranks have written all of it when this returns."""
        with self._writing():
            self._writer.finish()

    def load(self, folder: Path, same_layout: bool) -> None:
        """Go on from a checkpoint that ranks of any layout wrote. Raises ValueError."""

        from miles_lite.trainer.megatron import checkpoint

        self._memory.take_optimizer()
        checkpoint.load(folder, self._ddp, self._optimizer, self._reference, same_layout)

    def digests(self, folder: Path, files: Sequence[str]) -> dict[str, str]:
        """Of each file, its content's hash; "" if it cannot be read."""
        return {file: file_digest(folder / file) for file in files}

    # ------------------------------------------------------------------ weights out

    def checksums(self, of_files: bool) -> dict[tuple[str, int, int], int]:
        """(HF tensor, first row, end) -> checksum of what this rank hosts of it, live or as the
        files have it."""
        files, found = HfCheckpoint(self._spec.model_path), {}
        for hosted in self._hosted:
            live = self._weights[hosted.param].detach()
            for tensor, start, offset, count in iter_segments(hosted):
                if of_files:
                    rows = files.read(tensor, hosted.dim, start, start + count).to(live.dtype)
                else:
                    rows = live.narrow(hosted.dim, offset, count)
                found[tensor, start, start + count] = checksum(rows)
        return found

    def hosted(self) -> list[Hosted]:
        return self._hosted

    def tensor(self, param: str) -> torch.Tensor:
        """The live storage of a parameter or buffer."""
        return self._weights[param]

    def prepare_sync(self, mine: Sequence[Itinerary], receivers: Sequence[Any]) -> None:
        """Once: the itineraries that start or pass here, and remote handles of all engine ranks."""
        self._sender.prepare(mine, receivers)

    def send_weights(self) -> SyncReport:
        """Send this rank's part of the weights; all ranks at once. See weights.sender."""
        return self._sender.send(self._spec.sync_timeout_s)

    def export_hf(self, folder: Path, owned: Sequence[tuple[str, int, int]]) -> None:
        """Write this rank's share of an HF checkpoint: `owned` lists (tensor, start, stop) rows."""

        writer = HfWriter(folder, HfCheckpoint(self._spec.model_path))
        mine = set(owned)
        for hosted in self._hosted:
            for tensor, start, offset, count in iter_segments(hosted):
                if (tensor, start, start + count) in mine:
                    rows = self._weights[hosted.param].narrow(hosted.dim, offset, count)
                    with writing(folder):
                        writer.write(tensor, hosted.dim, start, rows)
