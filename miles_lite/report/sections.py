"""From metrics to the tables and series of a report: pure functions of the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from miles_lite.alarms import Alarm
from miles_lite.protocols import Metrics
from miles_lite.report.names import WHOLES, memory_parts, number, percent, seconds, size, words
from miles_lite.report.runs import RunData
from miles_lite.summary import Summary

Cell = str | Mapping[str, object]  # {"text": ..., "share": of a bar's length}


@dataclass(frozen=True, slots=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts that add up, one chart a run: over the steps, or over `labels`."""

    labels: Sequence[int | str]
    parts: Mapping[str, Sequence[float | None]]


# ------------------------------------------------------------------ at a glance


def overview(runs: Sequence[RunData]) -> Table:
    def row(label: str, tell: Callable[[RunData], str]) -> list[str]:
        return [label, *(tell(run) for run in runs)]

    def of(key: str, unit: Callable[[float | None], str] = number) -> Callable[[RunData], str]:
        def tell(run: RunData) -> str:
            value = run.summary.get(key)
            return unit(value if isinstance(value, int | float) else None)

        return tell

    def from_to(first: str, last: str) -> Callable[[RunData], str]:
        return lambda run: f"{of(first)(run)} → {of(last)(run)}"

    keys = sorted({key for run in runs for key in run.summary if key.endswith(" before")})
    held_out = {key: key.removeprefix("eval/").removesuffix(" before") for key in keys}
    rows = [
        row("How it ended", lambda run: run.outcome),
        row("Steps trained", of("num_steps")),
        row("Restarts", lambda run: _restarts(run.summary)),
        row("Reward, first step → mean of the last five", from_to("reward_first", "reward_last")),
        *(
            row(f"Held-out reward, {name}, before → after", from_to(key, f"eval/{name} after"))
            for key, name in held_out.items()
        ),
        row("Drift at most, nats a token", of("drift_max")),
        row("Answers without a verdict at most", of("invalid_rewards", percent)),
        row("Seconds a step (median)", of("step_time_s", seconds)),
        row("Tokens a second, generating", of("rollout_tokens_per_s")),
        row("Tokens a second, training", of("train_tokens_per_s")),
        row("Code", lambda run: str(run.environment.get("git.commit", "–"))[:12]),
        row("Devices", _devices),
    ]
    return Table("Runs", ["What", *(run.name for run in runs)], rows)


def _restarts(summary: Summary) -> str:
    return f"{summary['restarts']}: {summary['restart_causes']}" if "restarts" in summary else "0"


def _devices(run: RunData) -> str:
    gpus = run.environment.get("gpus")
    if gpus:
        return f"{len(gpus)} × {gpus[0]} in the driver's host"
    return f"{run.environment.get('cpus', '?')} CPU cores, no GPU in the driver's host"


def alarms(runs: Sequence[RunData]) -> list[dict[str, str]]:
    """One entry for each alarm of a run, however long it was up; critical ones first."""
    found: list[dict[str, str]] = []
    for run in runs:
        by_name = sorted(run.alarms, key=lambda alarm: (alarm.name, alarm.step))
        for _, group in groupby(by_name, key=lambda alarm: alarm.name):
            rung = list(group)
            found.append(_entry(run, rung[-1], _when([alarm.step for alarm in rung])))
        if run.no_limits:
            message = (
                f"alarms are by the default limits, as those of the run are lost: {run.no_limits}"
            )
            remedy = "Make the report with the version of miles-lite that made the run"
            found.append(_entry(run, Alarm(0, "limits", "note", message, remedy), "all steps"))
    return sorted(found, key=lambda entry: entry["severity"] != "critical")


def _entry(run: RunData, alarm: Alarm, when: str) -> dict[str, str]:
    return {
        "run": run.name,
        "name": alarm.name,
        "severity": alarm.severity,
        "when": when,
        "message": alarm.message,
        "remedy": alarm.remedy,
    }


def _when(up: Sequence[int]) -> str:
    """At which steps an alarm was up."""
    first, last = up[0], up[-1]
    if first == last:
        return f"step {first}"
    span = f"steps {first} to {last}"
    return span if len(up) == last - first + 1 else f"{len(up)} of the {span}"


# ------------------------------------------------------------------ curves


def series(run: RunData, stride: int = 1) -> dict[str, list[float | str | None]]:
    """Each metric by step, "step" among them: every stride-th step, those evaluated, the last."""
    last = max(run.metrics, default=0)
    steps = [
        step
        for index, (step, metrics) in enumerate(run.metrics.items())
        if index % stride == 0 or step == last or any(name.startswith("eval/") for name in metrics)
    ]
    names = dict.fromkeys(name for step in steps for name in run.metrics[step])
    columns: dict[str, list[float | str | None]] = {"step": [*map(float, steps)]}
    for name in names:
        columns[name] = [_short(run.metrics[step].get(name)) for step in steps]
    return columns


def _short(value: float | None) -> float | str | None:
    """Six digits; what is not finite by its name, since JSON has none."""
    if value is None:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


# ------------------------------------------------------------------ time

_PARTS = (
    ("perf/rollout_time", "generate and grade"),
    ("perf/log_probs_time", "log-probs before the update"),
    ("perf/ref_log_probs_time", "log-probs of the reference"),
    ("perf/no_replay_time", "drift without routing replay"),
    ("perf/actor_train_time", "updates"),
    ("perf/update_weights_time", "sync weights"),
)
ENTER = ("perf/enter_generate_time", "perf/enter_train_time", "perf/enter_sync_time")


def step_parts(metrics: Metrics) -> dict[str, float]:
    """Seconds of a step by what they were spent on; they add up to its time."""
    parts = {label: metrics[name] for name, label in _PARTS if name in metrics}
    inner = sum(metrics.get(name, 0.0) for name, _ in _PARTS[1:5])
    if "perf/train_time" in metrics:
        parts["hand over the batch"] = max(0.0, metrics["perf/train_time"] - inner)
    parts["free and take memory"] = sum(metrics.get(name, 0.0) for name in ENTER)
    rest = metrics["perf/step_time"] - sum(parts.values())
    parts["evaluation and all else"] = max(0.0, rest)
    return parts


def step_time(run: RunData, stride: int = 1) -> Stack:
    steps = [step for index, step in enumerate(run.trained) if index % stride == 0]
    by_step = [step_parts(run.metrics[step]) for step in steps]
    labels = dict.fromkeys(label for parts in by_step for label in parts)
    return Stack(
        steps,
        {label: [float(f"{p.get(label, 0.0):.4g}") for p in by_step] for label in labels},
    )


def step_time_table(runs: Sequence[RunData]) -> Table:
    means = {run.name: _means(step_parts(m) for m in run.trained.values()) for run in runs}
    labels = dict.fromkeys(label for parts in means.values() for label in parts)
    rows: list[list[Cell]] = []
    for label in labels:
        row: list[Cell] = [label]
        for run in runs:
            parts = means[run.name]
            share = parts.get(label, 0.0) / max(1e-12, sum(parts.values()))
            row.append(bar(f"{seconds(parts.get(label))} ({percent(share)})", share))
        rows.append(row)
    note = "Means over the steps. Generating includes grading, which runs beside it."
    return Table("Where the time of a step goes", ["Part", *means], rows, note)


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    listed = list(rows)
    labels = dict.fromkeys(label for row in listed for label in row)
    return {label: statistics.fmean(row.get(label, 0.0) for row in listed) for label in labels}


def bar(text: str, share: float) -> Cell:
    return {"text": text, "share": round(min(1.0, max(0.0, share)), 4)}


def _median(run: RunData, name: str) -> float | None:
    values = [m[name] for m in run.trained.values() if math.isfinite(m.get(name, math.nan))]
    return statistics.median(values) if values else None


# planned phases of each measured time; saving is not part of a step's time
_PHASES = {
    "perf/rollout_time": ("generate",),
    "perf/train_time": ("score", "train"),
    "perf/update_weights_time": ("sync",),
    "perf/step_time": ("generate", "score", "train", "sync"),
}


def limits(runs: Sequence[RunData]) -> Table:
    """How near each phase is to what the hardware allows."""

    def cell(run: RunData, name: str, phases: Sequence[str]) -> Cell:
        measured = _median(run, name)
        if not run.phases or not measured:
            return "–"
        floor = sum(run.phases[phase].floor_s for phase in phases)
        if not floor:
            return f"nothing bounds it ({seconds(measured)})"
        share = floor / measured
        return bar(f"{percent(share)} ({seconds(floor)} of {seconds(measured)})", share)

    rows: list[list[Cell]] = [
        [" + ".join(phases), *(cell(run, name, phases) for run in runs)]
        for name, phases in _PHASES.items()
    ]
    note = (
        "The limit is the time in which the busiest device could do the work at full bandwidth and "
        "peak speed, by the figures of cluster.hardware and the answer lengths that the plan "
        "assumes; measured is the median step. Over 100 % means that answers are shorter than "
        "assumed, or that the hardware is another. Of a laptop's CPU it says little."
    )
    missing = [f"{r.name} cannot be planned here: {r.not_planned}." for r in runs if r.not_planned]
    columns = ["Phase", *(run.name for run in runs)]
    return Table("Percent of the physical limit", columns, rows, " ".join([note, *missing]))


def planned(runs: Sequence[RunData]) -> Table:
    """What the plan said before the run against what the run measured."""

    def cell(run: RunData, name: str) -> Cell:
        unit = size if name.startswith("memory/") else seconds
        ratio, measured = _median(run, f"plan/{name}"), _median(run, name)
        if ratio is None or measured is None:
            return "–"
        if unit is size and ratio == measured:  # planned as nothing: see Expected.against
            return f"{size(measured)}, planned as none" if measured else "none, as planned"
        return f"{ratio:.2f} × ({unit(measured)} of {unit(measured / ratio)})" if ratio else "none"

    found = (name for run in runs for m in run.trained.values() for name in m)
    names = dict.fromkeys(n.removeprefix("plan/") for n in found if n.startswith("plan/"))
    rows: list[list[Cell]] = [
        [words(name), *(cell(run, name) for run in runs)]
        for name in sorted(names, key=lambda name: name.startswith("memory/"))
    ]
    note = (
        "Measured over planned, medians. Planned times are estimates from assumed efficiencies; "
        "bytes are exact but for activations."
    )
    return Table("Plan against measured", ["What", *(run.name for run in runs)], rows, note)


# ------------------------------------------------------------------ memory

_ORDER = ("generate", "train", "sync")


def memory(run: RunData) -> Stack:
    """The most bytes held on devices after entering each phase, by holder."""
    peaks = {key: held for key, held in _peaks(run).items() if key[2] not in WHOLES}
    phases = [phase for phase in _ORDER if any(phase == key[0] for key in peaks)]
    holders = dict.fromkeys((party, kind) for _, party, kind in peaks)
    parts = {
        f"{party} {kind}": [peaks.get((phase, party, kind), 0.0) for phase in phases]
        for party, kind in holders
    }
    return Stack(phases, {holder: values for holder, values in parts.items() if any(values)})


def _peaks(run: RunData) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for metrics in run.trained.values():
        for name, value in metrics.items():
            if parts := memory_parts(name):
                found[parts] = max(found.get(parts, 0.0), value)
    return found


def memory_table(runs: Sequence[RunData]) -> Table:
    stacks = {run.name: memory(run) for run in runs}
    keys = dict.fromkeys(
        (phase, holder)
        for stack in stacks.values()
        for phase in stack.labels
        for holder in (*stack.parts, "all")
    )
    rows: list[list[Cell]] = []
    for phase, holder in sorted(keys, key=lambda key: _ORDER.index(key[0])):
        row: list[Cell] = [str(phase), holder]
        for stack in stacks.values():
            parts = stack.parts if holder == "all" else {holder: stack.parts.get(holder, ())}
            at = stack.labels.index(phase) if phase in stack.labels else None
            held = sum(v[at] or 0.0 for v in parts.values() if v) if at is not None else None
            row.append(size(held))
        rows.append(row)
    peaks = {run.name: _peaks(run) for run in runs}
    wholes = {key for found in peaks.values() for key in found if key[2] in WHOLES}
    for phase, party, kind in sorted(wholes, key=lambda key: (_ORDER.index(key[0]), key)):
        held_by = [found.get((phase, party, kind)) for found in peaks.values()]
        rows.append([phase, f"{party}: {WHOLES[kind]}", *map(size, held_by)])
    note = (
        "Of all devices together, the most after entering the phase. Host memory, which no other "
        "process shares, is no part of it."
    )
    return Table("Memory by phase", ["Phase", "Held by", *stacks], rows, note)


# ------------------------------------------------------------------ configuration


def differences(runs: Sequence[RunData]) -> Table:
    """Keys of configuration and environment whose values differ between the runs."""
    rows = [row for row in _keys(runs) if len(set(map(str, row[1:]))) > 1]
    return Table("What differs", ["Key", *(run.name for run in runs)], rows)


def configuration(runs: Sequence[RunData]) -> Table:
    return Table("All of it", ["Key", *(run.name for run in runs)], _keys(runs))


def _keys(runs: Sequence[RunData]) -> list[list[Cell]]:
    both = [
        {**run.config, **{f"environment.{key}": value for key, value in run.environment.items()}}
        for run in runs
    ]
    keys = dict.fromkeys(key for one in both for key in one)
    return [[key, *(str(one.get(key, "–")) for one in both)] for key in keys]
