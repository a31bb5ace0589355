"""The run folder as one object: all that stays of a run. A crash leaves no half-written file.

    runs/tiny-20250101-120000/
      config.yaml           the resolved configuration, plain values
      environment.json      versions, machine, commit, command line
      metrics.jsonl         one line a step (and one an evaluation)
      samples/step_000000.jsonl.gz        one line a sample: SampleRecord
      eval/<set>/step_000000.jsonl.gz     the same for held-out prompts
      checkpoints/          what a restart needs, see checkpoints.py
      hf/                   the trained policy, written by the trainer
      summary.json          how the run ended
      restarts.jsonl        one line each, by who supervised it, see supervise.py

A run with a name goes on where it stopped when the same command is given again; `touch save_now` in
its folder asks for a checkpoint at the end of the step.

Step numbers count from 0: samples of step 0 were drawn by the first weights, and an evaluation at
step n is one of the weights after n steps.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
import orjson
import yaml

from miles_lite import environment
from miles_lite.checkpoints import Checkpoints
from miles_lite.claim import check_same, claim
from miles_lite.config import CheckpointConfig, Config, ConfigError
from miles_lite.intact import writing
from miles_lite.metrics import RUN_ID, JsonlSink, Sink, WandbSink, keep_run_id, kept_run_id
from miles_lite.protocols import Metrics, RunError, StepResult
from miles_lite.records import TOKEN_FLOATS, SampleRecord
from miles_lite.records import read_metrics as read_metrics  # part of what a run is
from miles_lite.records import read_samples as read_samples
from miles_lite.redact import redacted_settings
from miles_lite.types import Group, Sample, TrainSequence
from miles_lite.untrusted import parse_object

logger = logging.getLogger(__name__)


_NONE = np.empty(0, np.float32)


class Run:
    """Created by the driver, which alone writes here while it runs. A context: leaving it closes
    all sinks."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        lock: IO[str],
        sinks: Sequence[Sink],
        checkpoint: CheckpointConfig,
    ) -> None:
        self.folder = folder
        self.config = config  # the resolved one, as plain values
        self._lock = lock  # as long as it is open nobody else trains this run
        self.start = 0  # the first step to train
        self.checkpoints = Checkpoints(
            folder / "checkpoints", checkpoint.keep, checkpoint.keep_every
        )
        self.saves_meanwhile = checkpoint.asynchronous
        self.saving: tuple[int, dict[str, Any]] | None = None  # step and state not yet complete
        self._sinks = sinks
        self._checkpoint = checkpoint
        self._last_checkpoint = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._writing: Future[None] | None = None  # the samples of the last step

    @classmethod
    def open(cls, cfg: Config, now: datetime) -> Run:
        """A new run; or, if `log.name` is one that has not finished, that one, to go on with it.

        Raises RunFinished; ConfigError if it has other settings or is running; RunError.
        """
        _check(cfg)
        plain = redacted_settings(_plain(cfg))
        with writing(cfg.log.folder):
            if cfg.log.name:
                folder = cfg.log.folder / cfg.log.name
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = _new_folder(cfg.log.folder, f"{cfg.experiment}-{now:%Y%m%d-%H%M%S}")
            lock = claim(folder)
        check_same(folder, plain)
        _write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
        _write_json(folder / "environment.json", environment.describe())
        with writing(folder / "metrics.jsonl"):
            sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl")]
        if not kept_run_id(folder) and (run_id := _run_id_of_checkpoints(folder / "checkpoints")):
            keep_run_id(folder, run_id)
        if cfg.log.wandb_project:
            project = cfg.log.wandb_project
            described = plain | {"environment": environment.describe()}
            sinks.append(
                WandbSink(
                    folder,
                    project=project,
                    name=folder.name,
                    group=cfg.experiment,
                    config=described,
                )
            )
        return cls(folder, plain, lock, sinks, cfg.checkpoint)

    # ------------------------------------------------------------------ going on

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl: what is beyond, when a run goes back to now, never happened."""
        return (self.folder / "metrics.jsonl").stat().st_size

    @property
    def wandb_run_id(self) -> str:
        return kept_run_id(self.folder)

    def rewind(self, step: int, metrics_bytes: int) -> None:
        """Go on after `step` steps: drop what an earlier attempt logged beyond them."""
        self.start = step
        if (found := self.metrics_bytes) < metrics_bytes:  # a checkpoint that came from elsewhere
            logger.warning("%s lacks steps before %d", self.folder / "metrics.jsonl", step)
        with writing(self.folder):
            os.truncate(self.folder / "metrics.jsonl", min(found, metrics_bytes))
            for pattern in ("samples/step_*", "eval/*/step_*"):
                for file in self.folder.glob(pattern):
                    if _step_of(file) >= step:
                        file.unlink()
            (self.folder / "summary.json").unlink(missing_ok=True)

    def checkpoint_due(self, step: int) -> bool:
        """After `step` steps, by number, by time, or because somebody asked."""
        every, minutes = self._checkpoint.every, self._checkpoint.minutes
        waited = time.monotonic() - self._last_checkpoint
        due = (every and step % every == 0) or (minutes and waited >= 60 * minutes)
        return bool(due) or (self.folder / "save_now").exists()

    def checkpoint_done(self) -> None:
        self._last_checkpoint = time.monotonic()
        (self.folder / "save_now").unlink(missing_ok=True)

    @property
    def hf_folder(self) -> Path:
        """Where the trainer exports the final policy."""
        return self.folder / "hf"

    def log(self, step: int, metrics: Metrics) -> None:
        """To every sink. On disk when this returns."""
        with writing(self.folder / "metrics.jsonl"):
            for sink in self._sinks:
                sink.log(step, metrics)

    def log_eval(self, step: int, metrics: Metrics) -> None:
        """The same, for the "eval/..." metrics of the weights after `step` steps."""
        self.log(step, metrics)

    def save_samples(
        self,
        step: int,
        groups: Sequence[Group],
        result: StepResult,
        sequences: Sequence[TrainSequence],
    ) -> None:
        """Every sample of a step, with what the trainer said of those that it saw; none if
        `log.samples` is off. sequences: in rollout order. They are written beside what comes next,
        until `settle`."""
        if not self.config["log"]["samples"]:
            return
        self.settle()
        samples = [sample for group in groups for sample in group.samples]
        records = (
            _record(
                step,
                sample,
                result.logprobs.get(sequence.sample, _NONE).tolist(),
                result.entropies.get(sequence.sample, _NONE).tolist(),
                sequence.advantage if sequence.counts else math.nan,
            )
            for sample, sequence in zip(samples, sequences, strict=True)
        )
        path = self.folder / "samples" / _file_name(step)
        self._writing = self._writer.submit(_write_samples, path, records)
        for sink in self._sinks:
            sink.log_samples(step, samples)

    def settle(self) -> None:
        """The samples of the last step are on disk when this returns. Raises RunError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def save_eval(self, step: int, name: str, groups: Sequence[Group]) -> None:
        """Every answer to the held-out prompts of set `name`."""
        records = (_record(step, sample) for group in groups for sample in group.samples)
        _write_samples(self.folder / "eval" / name / _file_name(step), records)

    def finish(
        self,
        summary: Mapping[str, Any],
        outcome: Literal["finished", "failed", "interrupted"] = "finished",
    ) -> None:
        """Say how the run ended: `outcome` and whatever else is worth a line."""
        self.settle()
        values = {"outcome": outcome, **summary}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = str(value)  # JSON has no NaN
        _write_json(self.folder / "summary.json", values)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            outcome = "failed" if isinstance(error, Exception) else "interrupted"
            try:
                self.finish({"error": f"{type(error).__name__}: {error}"}, outcome)
            except RunError as second:  # on a full disk, say; the first error is what matters
                logger.error("%s", second)
            logger.warning("log.name=%s goes on with this run", self.folder.name)
        self._writer.shutdown()
        for sink in self._sinks:
            sink.close()
        self._lock.close()


# ------------------------------------------------------------------ writing


def _check(cfg: Config) -> None:
    if cfg.log.name == ".." or cfg.log.name != Path(cfg.log.name).name:
        raise ConfigError(
            f"log.name = {cfg.log.name!r} is not a plain name; the place is log.folder"
        )
    if cfg.log.wandb_project:
        try:
            metadata.version("wandb")
        except metadata.PackageNotFoundError:
            raise ConfigError(
                f"log.wandb_project = {cfg.log.wandb_project!r} but wandb is not installed: "
                "pip install 'miles-lite[wandb]', or leave log.wandb_project empty"
            ) from None


def _run_id_of_checkpoints(folder: Path) -> str:
    """The W&B id that a checkpoint brought along; "" if none does. All are of one run."""
    for state in sorted(folder.glob("step_*/state.json"), reverse=True):
        with suppress(OSError, ValueError):  # damaged ones are told of on loading
            if run_id := parse_object(state.read_bytes(), str(state)).get(RUN_ID):
                return str(run_id)
    return ""


def _step_of(file: Path) -> int:
    return int(file.name.removeprefix("step_").split(".")[0])


def _new_folder(parent: Path, name: str) -> Path:
    """The first of name, name-2, name-3, ... that nobody has. mkdir itself decides a race."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def _plain(value: Any) -> Any:
    """Dataclasses as mappings and paths as text, so that YAML and JSON need no types of ours."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _record(
    step: int,
    sample: Sample,
    trainer_logprobs: Sequence[float] = (),
    entropies: Sequence[float] = (),
    advantage: float = math.nan,
) -> SampleRecord:
    return SampleRecord(
        step=step,
        prompt_uid=sample.prompt.uid,
        prompt=sample.prompt.text,
        label=sample.prompt.label,
        response=sample.text,
        tokens=sample.completion.tokens,
        logprobs=sample.completion.logprobs,
        trainer_logprobs=trainer_logprobs,
        reward=sample.verdict.reward,
        invalid=sample.verdict.reason,
        version=sample.completion.version,
        finish=sample.completion.finish.value,
        advantage=advantage,
        entropies=entropies,
    )


def _json_array(values: Sequence[float], dtype: type[np.generic]) -> bytes:
    """With the digits that give every float32 back exactly; "null" is NaN or infinite. All at
    once: a step of a large run has tens of millions."""
    array = np.asarray(values, dtype)
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def _file_name(step: int) -> str:
    return f"step_{step:06d}.jsonl.gz"


def _write_samples(path: Path, records: Iterable[SampleRecord]) -> None:
    with _replacing(path) as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw) as file:
        for record in records:
            line = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            arrays = {"tokens": _json_array(line.pop("tokens"), np.int64)}
            arrays |= {key: _json_array(line.pop(key), np.float32) for key in TOKEN_FLOATS}
            if not math.isfinite(record.advantage):
                line["advantage"] = None
            text = json.dumps(line)[:-1].encode("ascii")  # orjson refuses half a surrogate pair
            told = [text, *(b'"%s": %s' % (key.encode(), array) for key, array in arrays.items())]
            file.write(b", ".join(told) + b"}\n")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as file:
        file.write(text.encode())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete and on disk."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
