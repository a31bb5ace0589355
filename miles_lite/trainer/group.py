"""All trainer ranks as one `Trainer`: the driver's side."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from miles_lite.cluster.actor import Call, Remote, ask_each, call_all, gather
from miles_lite.cluster.lease import total_bytes
from miles_lite.intact import writing
from miles_lite.metrics import finish, merge
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.protocols import (
    Engine,
    EnginesLost,
    Metrics,
    NonFiniteError,
    Phase,
    Rollout,
    StepResult,
    TokenValues,
)
from miles_lite.trainer.megatron.messages import RankReport, WorkerSpec
from miles_lite.types import Batch
from miles_lite.weights.hf import HfCheckpoint, HfWriter
from miles_lite.weights.plan import Route, sync_plan
from miles_lite.weights.sender import Itinerary, SyncReport, itineraries
from miles_lite.weights.table import hf_tensors, iter_segments, mtp_tensors, trainer_layouts
from miles_lite.weights.transport import compare


class TrainerGroup:
    """Implements protocols.Trainer over one remote worker a device; worker i sits on hosts[i]."""

    def __init__(
        self,
        workers: Sequence[Remote],
        hosts: Sequence[str],
        spec: WorkerSpec,
        bucket_bytes: int,
        start_timeout_s: float,
    ) -> None:
        self._workers = workers
        self._spec = spec
        self._model = NemotronH.from_folder(spec.model_path)
        self._bucket_bytes = bucket_bytes
        self._timeout_s = spec.train.timeout_s
        self._plan: list[Route] = []
        self._planned_for: Sequence[Remote] = ()  # engine ranks the plan was made for
        self._hosted_bytes = 0  # of weights, on all engine ranks
        # whose memory an engine rank can read: of its host's trainers; on a GPU of its device's
        self._reach = hosts if spec.device == "cpu" else [w.name for w in workers]
        address = workers[0].call("listen", hosts[0], deadline_s=start_timeout_s)
        call_all(workers, "setup", address, deadline_s=start_timeout_s)

    @property
    def dp(self) -> int:
        return self._spec.dims.dp

    def step(self, batch: Batch) -> StepResult:
        shares = [
            [update.micro_batches[dp_rank] for update in batch.updates]
            for dp_rank in range(self.dp)
        ]
        begin = time.perf_counter()
        calls = self._start_on_shares("step", shares)
        reports: list[RankReport] = gather(calls, self._timeout_s)
        metrics = finish(merge(*(report.partials for report in reports)))
        seconds = time.perf_counter() - begin
        num_tokens = sum(len(sequence.tokens) for sequence in batch.sequences)
        metrics["perf/train_time"] = seconds
        metrics["perf/actor_train_tok_per_s"] = num_tokens / metrics["perf/actor_train_time"]
        logprobs = {k: v for report in reports for k, v in report.logprobs.items()}
        entropies = {k: v for report in reports for k, v in report.entropies.items()}
        result = StepResult(metrics, logprobs, entropies)
        if broken := reports[0].broken:
            raise NonFiniteError(f"the trainer failed in 'step': {broken}", result)
        return result

    def _start_on_shares(self, method: str, shares: Sequence[Any]) -> list[Call]:
        """Samples travel by reference: one object a DP rank, fetched by the ranks that need it."""
        refs = [ray.put(share) for share in shares]
        return [
            worker.start(method, refs[self._spec.dims.dp_rank(rank)])
            for rank, worker in enumerate(self._workers)
        ]

    def refresh_reference(self) -> None:
        call_all(self._workers, "refresh_reference", deadline_s=self._timeout_s)

    # ------------------------------------------------------------------ checkpoints

    @property
    def layout(self) -> Mapping[str, int]:
        return dataclasses.asdict(self._spec.dims)

    def score(self, batch: Batch) -> TokenValues:
        calls = self._start_on_shares("score", batch.updates[0].micro_batches)
        return {k: v for scores in gather(calls, self._timeout_s) for k, v in scores.items()}

    def save(self, folder: Path, asynchronous: bool) -> None:
        deadline = self._timeout_s
        call_all(self._workers, "save", folder.absolute(), asynchronous, deadline_s=deadline)

    def finish_save(self) -> None:
        call_all(self._workers, "finish_save", deadline_s=self._timeout_s)

    def load(self, folder: Path, same_layout: bool) -> None:
        call_all(self._workers, "load", folder.absolute(), same_layout, deadline_s=self._timeout_s)

    def digests(self, folder: Path, files: Sequence[str]) -> Mapping[str, str]:
        """Read by all ranks at once, each its share of the bytes."""
        shares: list[list[str]] = [[] for _ in self._workers]
        sizes = {file: path.stat().st_size for file in files if (path := folder / file).is_file()}
        loads = [0] * len(shares)
        for file in sorted(files, key=lambda file: -sizes.get(file, 0)):
            lightest = loads.index(min(loads))
            shares[lightest].append(file)
            loads[lightest] += sizes.get(file, 0)
        calls = [
            worker.start("digests", folder.absolute(), share)
            for worker, share in zip(self._workers, shares, strict=True)
        ]
        return {k: v for part in gather(calls, self._timeout_s) for k, v in part.items()}

    # ------------------------------------------------------------------ memory

    def enter(self, phase: Phase) -> Mapping[str, int]:
        return total_bytes(call_all(self._workers, "enter", phase, deadline_s=self._timeout_s))

    def held_bytes(self) -> Mapping[str, int]:
        return total_bytes(call_all(self._workers, "held_bytes", deadline_s=self._timeout_s))

    # ------------------------------------------------------------------ weights

    def send_weights(self, rollout: Rollout, version: int) -> Metrics:
        """See protocols.Trainer. Raises WeightSyncError naming engine rank and tensor."""
        try:
            return self._send_weights(rollout, version)
        except EnginesLost:
            self._planned_for = ()  # what the others have got of this sync, they are to forget
            raise

    def _send_weights(self, rollout: Rollout, version: int) -> Metrics:
        begin = time.perf_counter()
        engines = rollout.engines
        receivers: list[Remote] = [r for engine in engines for r in engine.receivers()]
        if list(self._planned_for) != receivers:
            self._make_plan(engines, receivers)
        ask_each(engines, lambda engine: engine.begin_sync(version))
        deadline = self._timeout_s
        sent: list[SyncReport] = call_all(self._workers, "send_weights", deadline_s=deadline)
        if lost := {target: why for report in sent for target, why in report.lost.items()}:
            owners = [engine.name for engine in engines for _ in engine.receivers()]
            raise EnginesLost({owners[target]: why for target, why in lost.items()})
        deadline = self._spec.sync_timeout_s
        arrived = ask_each(
            engines, lambda engine: call_all(engine.receivers(), "finish_sync", deadline_s=deadline)
        )
        received = [of_rank for of_engine in arrived for of_rank in of_engine]
        for route in self._plan:
            compare(
                receivers[route.target].name,
                route,
                sent[route.source].checksums[route.target],
                received[route.target][route.source],
            )
        ask_each(engines, lambda engine: engine.commit(version))
        rollout.version = version
        return {
            "perf/update_weights_time": time.perf_counter() - begin,
            "sync/bytes": float(sum(report.num_bytes for report in sent)),
            "sync/relayed_bytes": float(sum(report.relayed_bytes for report in sent)),
            "sync/bytes_over_hosted": sum(report.num_bytes for report in sent) / self._hosted_bytes,
            "sync/send_time_max": max(report.seconds for report in sent),
            "sync/version": float(version),
            # all equal, or `compare` would have raised
            "sync/checksums": float(sum(len(sums) for of in received for sums in of.values())),
        }

    def _make_plan(self, engines: Sequence[Engine], receivers: Sequence[Remote]) -> None:
        """Derive who sends what to whom and tell both sides. Once per set of engine processes."""
        dims = self._spec.dims
        targets = [hosted for engine in engines for hosted in engine.layout()]
        home = list(range(len(targets)))  # engine rank i sits on the device of trainer rank i
        self._plan = sync_plan(
            hf_tensors(self._model),
            trainer_layouts(self._model, dims),
            targets,
            home=home,
            element_bytes=4 if self._spec.dtype == "fp32" else 2,
            bucket_bytes=self._bucket_bytes,
        )
        passing: dict[int, list[Itinerary]] = defaultdict(list)  # by trainer rank
        for way in itineraries(self._plan, self._reach, home):
            for rank in {way.route.source, way.last}:
                passing[rank].append(way)
        ending: dict[str, list[Route]] = defaultdict(list)  # by engine rank
        for route in self._plan:
            ending[receivers[route.target].name].append(route)
        everyone = ray.put(receivers)
        calls = [
            worker.start("prepare_sync", passing[rank], everyone)
            for rank, worker in enumerate(self._workers)
        ]
        gather(calls, self._timeout_s)  # now no bucket of a sync that failed is on its way

        def set_routes(engine: Engine) -> int:
            calls = [rank.start("set_routes", ending[rank.name]) for rank in engine.receivers()]
            gather(calls, self._spec.sync_timeout_s)
            return engine.held_bytes()["weights"]

        self._hosted_bytes = sum(ask_each(engines, set_routes))
        self._planned_for = receivers

    def checksums(self, of_files: bool) -> list[Mapping[tuple[str, int, int], int]]:
        """By rank, of the rows of HF tensors that it hosts: its own, or those of the model's files
        in its dtype. In the phases in which weights are on the device."""
        return call_all(self._workers, "checksums", of_files, deadline_s=self._timeout_s)

    def export_hf(self, folder: Path) -> None:
        """Every rank writes its rows straight into the files; replicas are written once."""
        dims, source = self._spec.dims, HfCheckpoint(self._spec.model_path)
        writer = HfWriter(folder, source)
        with writing(folder):
            writer.create()
        owner: dict[tuple[str, int, int], int] = {}
        for rank, layout in enumerate(trainer_layouts(self._model, dims)):
            for hosted in layout:
                for tensor, start, _, count in iter_segments(hosted):
                    owner.setdefault((tensor, start, start + count), rank)
        owned: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for piece, rank in owner.items():
            owned[rank].append(piece)
        calls = [
            worker.start("export_hf", folder, owned[rank])
            for rank, worker in enumerate(self._workers)
        ]
        gather(calls, self._timeout_s)
        with writing(folder):
            for name in mtp_tensors(self._model):
                writer.copy_from_template(name)
            writer.finish()

    def close(self) -> None:
        """End all workers; whatever they shared goes with them."""
        for worker in self._workers:
            worker.kill()
