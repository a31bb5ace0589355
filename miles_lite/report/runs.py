"""What a run folder tells a report. It may still be written, and of an earlier version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_lite.alarms import Alarm, Limits, timeline
from miles_lite.claim import flat
from miles_lite.compose import build
from miles_lite.config import Config
from miles_lite.planner.plan import planned_step, read_model
from miles_lite.planner.time import PhaseTime
from miles_lite.protocols import Metrics
from miles_lite.records import read_mapping, read_metrics
from miles_lite.summary import Summary, summarize

# what a reader may share the report with needs no account names: no host, folder or command line
_ENVIRONMENT = ("python", "platform", "cpus", "memory_bytes", "gpus", "git", "packages")


@dataclass(frozen=True, slots=True)
class RunData:
    name: str  # unique among the runs of a report
    folder: Path
    metrics: Mapping[int, Metrics]  # by step
    summary: Summary
    outcome: str
    config: Mapping[str, Any]  # by dotted key; empty if the file is not there
    environment: Mapping[str, Any]
    alarms: Sequence[Alarm]  # at each step that they were up
    no_limits: str  # why they are by the default limits; "" if by those of the run
    phases: Mapping[str, PhaseTime]  # as planned; empty if the configuration cannot be planned here
    not_planned: str  # why
    drift: Mapping[str, Any]  # what the last `miles-lite drift` found; empty without one

    @property
    def trained(self) -> dict[int, Metrics]:
        """Steps that trained: the last evaluation is one of a step that does not."""
        return {step: m for step, m in self.metrics.items() if "perf/step_time" in m}


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Raises ValueError for a folder that is not one of a run."""
    names: list[str] = []
    for folder in folders:
        plain = folder.resolve().name
        taken = [name for name in names if name == plain or name.startswith(f"{plain} (")]
        names.append(f"{plain} ({len(taken) + 1})" if taken else plain)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunData:
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no metrics.jsonl. Runs lie under "
            "log.folder, and `miles-lite train` says where when it ends"
        )
    metrics = read_metrics(folder)
    raw = read_mapping(folder / "config.yaml")
    environment = read_mapping(folder / "environment.json")
    cfg, why = _config(raw)
    phases, not_planned = _phases(cfg) if cfg else ({}, why)
    return RunData(
        name=name,
        folder=folder,
        metrics=metrics,
        summary=summarize(folder, metrics),
        outcome=_outcome(read_mapping(folder / "summary.json")),
        config=flat(raw),
        environment=flat({key: environment[key] for key in _ENVIRONMENT if environment.get(key)}),
        alarms=timeline(metrics, Limits.of(cfg) if cfg else Limits()),
        no_limits=why,
        phases=phases,
        not_planned=not_planned,
        drift=read_mapping(folder / "drift.json"),
    )


def _outcome(summary: Mapping[str, Any]) -> str:
    if not summary:
        return "still running, or killed"
    error = summary.get("error", "")
    return f"{summary.get('outcome', '?')}{': ' if error else ''}{error}"


def _config(raw: Mapping[str, Any]) -> tuple[Config | None, str]:
    """That of the run, or why there is none."""
    if not raw:
        return None, "the run folder has no config.yaml"
    try:
        return build(Config, raw, ""), ""
    except ValueError as error:  # of a version with other keys
        return None, str(error)


def _phases(cfg: Config) -> tuple[dict[str, PhaseTime], str]:
    """The planned times of the run's phases, or why there are none."""
    try:
        _, step = planned_step(cfg, read_model(cfg)[0])
    except ValueError as error:  # the model was moved elsewhere
        return {}, str(error)
    return {phase.phase: phase for phase in step.phases}, ""
