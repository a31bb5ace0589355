"""Numbers on their way out: partials that merge over micro-batches and ranks, and their sinks.

A partial is what one micro-batch on one rank knows of a metric. Merging is associative and
commutative, so it does not matter where or in which order it happens; NaN survives it.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil

from miles_lite.protocols import Metrics
from miles_lite.types import Sample

logger = logging.getLogger(__name__)

ABS_DIFF = "train/train_rollout_logprob_abs_diff"  # the drift: the headline of a step

RUN_ID = "wandb_run_id"  # a file of the run folder, and a key of its checkpoints


@dataclass(frozen=True, slots=True)
class Sum:
    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)

    def finish(self) -> float:
        return float(self.value)


@dataclass(frozen=True, slots=True)
class Mean:
    total: float  # sum of weight x value
    weight: float  # sum of weights, or the number of values

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def finish(self) -> float:
        """NaN if there was nothing to average: no number is not the number 0."""
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True, slots=True)
class Max:
    value: float  # -inf: nothing seen

    def merge(self, other: Max) -> Max:
        # Not max(): it keeps or drops a NaN depending on the order of its arguments.
        keep = self.value >= other.value or math.isnan(self.value)
        return self if keep else other

    def finish(self) -> float:
        return math.nan if self.value == -math.inf else float(self.value)


Partial = Sum | Mean | Max


def merge(*parts: Mapping[str, Partial]) -> dict[str, Partial]:
    """One mapping of all; a metric missing from some parts is merged from the others."""
    by_name: dict[str, list[Any]] = {}
    for part in parts:
        for name, partial in part.items():
            by_name.setdefault(name, []).append(partial)
    for name, partials in by_name.items():
        assert len(set(map(type, partials))) == 1, f"{name} is of several kinds: {partials}"
    return {name: reduce(lambda a, b: a.merge(b), each) for name, each in by_name.items()}


def finish(partials: Mapping[str, Partial]) -> Metrics:
    return {name: partial.finish() for name, partial in partials.items()}


# ------------------------------------------------------------------ sinks


class Sink(Protocol):
    """Where the metrics of each step go. Called by the driver only."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Those of a step, for people to look at some."""
        ...

    def close(self) -> None: ...


SAMPLE_COLUMNS = ("step", "prompt", "response", "label", "reward", "no verdict because")
SERVICE = "wandb-core"  # the process of W&B beside ours
INIT_S, PATIENCE_S = 20, 60.0  # for its server to let a run start; for its process in any call
SHOWN_EVERY, SHOWN_SAMPLES, SHOWN_CHARS = 10, 16, 4000  # steps, samples of each, of a text


class JsonlSink:
    """metrics.jsonl: one JSON object a step (and one an evaluation), on disk when `log` returns.

    JSON knows no NaN or infinity: they become null, and "nonfinite" tells which they were. A run
    that resumes appends: where a metric of a step occurs twice the later line counts.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_cut_line(path)
        self._file = path.open("ab", buffering=0)  # nothing is left for `close` to fail at

    def log(self, step: int, metrics: Metrics) -> None:
        broken = {name: str(v) for name, v in metrics.items() if not math.isfinite(v)}
        record: dict[str, Any] = {"step": step}
        record |= {name: None if name in broken else value for name, value in metrics.items()}
        if broken:
            record["nonfinite"] = broken
        rest = json.dumps(record, allow_nan=False).encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """They all have a file of their own in the run folder."""

    def close(self) -> None:
        self._file.close()


def drop_cut_line(path: Path) -> None:
    """A process killed while writing, or a full disk, leaves the start of a line; what follows must
    not join it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class WandbSink:
    """Weights & Biases: metrics against step axes of their own, files under the run folder.

    Without WANDB_API_KEY or a login the run is kept offline (`wandb sync` sends it later) and no
    network call is made; WANDB_MODE overrides this. A server that does not answer makes it an
    offline run, too. The run id lies in the run folder and in each checkpoint, so a resumed run is
    the same run. Raises ImportError if wandb is not installed; any other failure of wandb is logged
    and counted in `num_errors`, and the training goes on: a call that takes longer than PATIENCE_S
    loses the process that it waits for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_login() else "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it calls home, and waits for it
        self._wandb = import_module("wandb")
        if not hasattr(self._wandb, "init"):  # a folder of that name in the working directory
            raise ImportError("wandb is not installed")
        self.num_errors = 0
        self._prefixes: set[str] = set()  # of metrics whose x-axis is defined
        self._run: Any = None
        wanted = {
            "dir": str(folder),
            "project": project,
            "name": name,
            "group": group,
            "id": kept_run_id(folder) or _new_run_id(folder),
            "config": dict(config or {}),
            # wandb's own record of machine and command line would have what was said there in plain
            # words; ours is in `config`
            "settings": self._wandb.Settings(
                console="off", init_timeout=INIT_S, x_disable_meta=True
            ),
        }
        with self._bounded("start"):
            resume = None if mode == "offline" else "allow"
            self._run = self._wandb.init(mode=mode, resume=resume, **wanted)
        if self._run is None and mode == "online":
            _end_service()  # it holds the run's id until it reaches its server
            with suppress(Exception, SystemExit):
                self._wandb.teardown()
            with self._bounded("start offline"):
                self._run = self._wandb.init(mode="offline", **wanted)
                logger.warning(
                    "W&B: offline from here; `wandb sync` sends it from %s/wandb", folder
                )

    def log(self, step: int, metrics: Metrics) -> None:
        """`step` fills in the x-axes ("train/step", ...) that the metrics do not bring along."""
        if self._run is None:
            return
        prefixes = {name.split("/")[0] for name in metrics}
        with self._bounded("log"):
            for prefix in sorted(prefixes - self._prefixes):
                self._run.define_metric(wandb_axis(prefix))
                self._run.define_metric(f"{prefix}/*", step_metric=wandb_axis(prefix))
                self._prefixes.add(prefix)
            self._run.log({wandb_axis(prefix): step for prefix in sorted(prefixes)} | metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        if self._run is None or step % SHOWN_EVERY:
            return
        rows = [_row(step, sample) for sample in samples[:SHOWN_SAMPLES]]
        with self._bounded("log samples"):
            table = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)
            self._run.log({wandb_axis("rollout"): step, "rollout/samples": table})

    def close(self) -> None:
        if self._run is None:
            return
        with self._bounded("finish"):
            try:
                self._run.finish()
            finally:  # or this process would wait, for ever, when it exits
                self._wandb.teardown()

    @contextmanager
    def _bounded(self, what: str) -> Iterator[None]:
        """A failure meanwhile is told; what takes too long fails, as its service is killed."""
        timer = threading.Timer(PATIENCE_S, _end_service)
        timer.start()
        try:
            yield
        except (Exception, SystemExit) as error:  # teardown exits with the status of a service
            self.num_errors += 1
            logger.warning("W&B failed to %s (error %d): %r", what, self.num_errors, error)
        finally:
            timer.cancel()


def _end_service() -> None:
    """The process that W&B started below this one, if there is one."""
    for child in psutil.Process().children():
        if child.name() == SERVICE:
            logger.warning("W&B: its process %d is killed: it does not come to an end", child.pid)
            child.kill()


def _row(step: int, sample: Sample) -> list[Any]:
    """As SAMPLE_COLUMNS."""
    texts = [_shortened(text) for text in (sample.prompt.text, sample.text)]
    return [step, *texts, sample.prompt.label, sample.verdict.reward, sample.verdict.reason]


def _shortened(text: str) -> str:
    """Without its middle if it is long."""
    half = SHOWN_CHARS // 2
    return text if len(text) <= SHOWN_CHARS else f"{text[:half]} [...] {text[-half:]}"


def wandb_axis(prefix: str) -> str:
    """train/* counts updates, eval/* evaluations, all else (perf/*, reward/*, ...) rollouts."""
    return f"{prefix if prefix in ('train', 'eval') else 'rollout'}/step"


def kept_run_id(folder: Path) -> str:
    """The W&B id of the run in this folder; "" if it has none."""
    path = folder / RUN_ID
    return path.read_text().strip() if path.exists() else ""


def keep_run_id(folder: Path, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_ID).write_text(run_id + "\n")


def _new_run_id(folder: Path) -> str:
    keep_run_id(folder, uuid.uuid4().hex[:8])
    return kept_run_id(folder)


def has_wandb_login() -> bool:
    """Whether wandb could go online without asking: a key in the environment or in the netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
