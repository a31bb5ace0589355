"""What lies between engine and trainer: parts of every step, and what `miles-lite drift` found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from miles_lite.metrics import ABS_DIFF
from miles_lite.report.names import number, words
from miles_lite.report.runs import RunData
from miles_lite.report.sections import Table

PARTS = (
    ABS_DIFF,
    "drift/decode_vs_trainer",
    "drift/decode_vs_prefill",
    "drift/prefill_vs_trainer",
    "drift/decode_shift",
    "drift/truncation",
    "drift/without_truncation",
    "drift/temperature",
    "drift/without_temperature",
    "drift/decode_prefill_flips",
    "train/routing_flip_rate",
    f"{ABS_DIFF}_replayed",
    f"{ABS_DIFF}_no_replay",
    "drift/version_gap",
    "sync/checksums",
)


def parts(runs: Sequence[RunData]) -> Table:
    """Medians over the steps of each run; what no run measured is left out."""
    rows = []
    for name in PARTS:
        values = [[m[name] for m in run.trained.values() if name in m] for run in runs]
        if any(values):
            cells = [number(statistics.median(v) if v else None) for v in values]
            rows.append([words(name), *cells])
    return Table(
        "The drift in parts (median over the steps)",
        ["What", *(run.name for run in runs)],
        rows,
        "Of a few answers of each step, scored again by the engine in one prefill; the first row "
        "is of all answers. A part that was not measured is missing.",
    )


def causes(runs: Sequence[RunData]) -> Table:
    """Of the last `miles-lite drift` on each run."""
    rows = [
        [run.name, f"step {told['step']}", name, size, evidence]
        for run in runs
        if (told := run.drift)
        for name, size, evidence in _findings(told)
    ]
    note = "" if rows else "`miles-lite drift RUN` takes one answer apart and leaves it here."
    return Table("One answer in depth", ["Run", "When", "What", "Size", "Evidence"], rows, note)


def _findings(told: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Causes, the parts they were found from, and the first layers that differ."""
    found = [(c["name"], number(c["size"]), c["evidence"]) for c in told["causes"]]
    found += [(name, number(value), "nats a token") for name, value in told["parts"].items()]
    for layer in told["layers"]:
        flips = "" if layer["flips"] is None else f", {layer['flips']:.2%} of routes flip"
        name = f"layer {layer['layer']} ({layer['kind']})"
        found.append((name, number(layer["mean"]), f"at most {number(layer['max'])}{flips}"))
    return found
