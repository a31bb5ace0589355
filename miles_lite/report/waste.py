"""The ledger of wasted compute: what a run spent on answers and waiting that taught nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from miles_lite.protocols import Metrics
from miles_lite.report.names import number, percent, seconds
from miles_lite.report.runs import RunData
from miles_lite.report.sections import ENTER, Cell, Table, bar


def _train_time(m: Metrics) -> float:
    return m.get("perf/train_time", 0.0)


def _rollout_time(m: Metrics) -> float:
    return m.get("perf/rollout_time", 0.0)


def _cut_tokens(m: Metrics) -> float:
    """Share of a rollout's tokens in answers cut at the limit: those are the longest there are."""
    mean = m.get("rollout/response_len/mean", 0.0)
    ratio = m.get("rollout/truncated_ratio", 0.0)
    return min(1.0, ratio * m.get("rollout/response_len/max", 0.0) / mean) if mean else 0.0


def _trained_for_nothing(m: Metrics) -> float:
    """Share of the trainer's time for answers of advantage 0; those it was spared cost nothing."""
    return max(0.0, m.get("rollout/zero_advantage_ratio", 0.0) - m.get("perf/spared_ratio", 0.0))


def _over_sampled(m: Metrics) -> float:
    return 1 - 1 / m.get("rollout/prompts_per_kept", 1.0)


# what, share of the answers (None: not a matter of answers), seconds it took of a step, what helps
Lost = Callable[[Metrics], float]
Waste = tuple[str, Callable[[Metrics], float] | None, Lost, str]
_WASTE: tuple[Waste, ...] = (
    (
        "Groups of zero advantage: all rewards equal",
        lambda m: m.get("rollout/zero_advantage_ratio", 0.0),
        lambda m: (
            m.get("rollout/zero_advantage_ratio", 0.0) * _rollout_time(m)
            + _trained_for_nothing(m) * _train_time(m)
        ),
        "harder or easier prompts, more samples a prompt, rollout.dynamic_sampling=true; "
        "algo.train_zero_advantage=false spares the trainer",
    ),
    (
        "Truncated: cut at the length limit",
        lambda m: m.get("rollout/truncated_ratio", 0.0),
        lambda m: _cut_tokens(m) * (_rollout_time(m) + _train_time(m)),
        "a larger rollout.max_response_tokens, or algo.overlong_buffer",
    ),
    (
        "Not counted: no verdict, or over-long and filtered",
        lambda m: m.get("rollout/not_counted_ratio", 0.0),
        lambda m: m.get("rollout/not_counted_ratio", 0.0) * _rollout_time(m),
        "the reasons are under reward/invalid/*; miles-lite reward-audit",
    ),
    (
        "Over-sampled: answered in full, dropped by dynamic sampling",
        _over_sampled,
        lambda m: _over_sampled(m) * _rollout_time(m),
        "prompts of middling difficulty; a smaller rollout.over_sampling",
    ),
    (
        "Idle: trainer ranks wait for the busiest",
        None,
        lambda m: (1 - 1 / max(1.0, m.get("perf/imbalance", 1.0))) * _train_time(m),
        "a larger train.max_tokens_per_micro_batch balances better",
    ),
    (
        "Idle: engine slots wait for the longest answer (at most)",
        None,
        lambda m: (
            _rollout_time(m)
            * (1 - m.get("rollout/response_len/mean", 0.0) / m["rollout/response_len/max"])
            if m.get("rollout/response_len/max")
            else 0.0
        ),
        "more answers than slots (rollout.engine.max_running), a lower length limit",
    ),
    (
        "Idle: between phases, moving memory",
        None,
        lambda m: sum(m.get(name, 0.0) for name in ENTER),
        "perf/enter_*_time says which phase",
    ),
)


def ledger(runs: Sequence[RunData]) -> Table:
    """Where compute went that taught nothing."""

    def cell(run: RunData, share: Callable[[Metrics], float] | None, lost: Lost) -> Cell:
        steps = list(run.trained.values())
        if not steps:
            return "–"
        spent = sum(map(lost, steps))
        part = spent / sum(m["perf/step_time"] for m in steps)
        told = f"{seconds(spent)}, {percent(part)} of the time"
        if share:
            told += f"; {percent(statistics.fmean(map(share, steps)))} of the answers"
        return bar(told, part)

    rows: list[list[Cell]] = [
        [what, *(cell(run, share, lost) for run in runs), remedy]
        for what, share, lost, remedy in _WASTE
    ]
    aborted = [
        sum(m.get("rollout/prompts_put_back", 0.0) for m in r.trained.values()) for r in runs
    ]
    rows.append(
        [
            "Aborted: begun ahead for dynamic sampling, given up unfinished",
            *(f"{number(count)} prompts, time not measured" for count in aborted),
            "a smaller rollout.over_sampling",
        ]
    )
    note = (
        "Seconds are shares of the phases' time, so estimates. Rows overlap: a truncated answer "
        "may also be of a group without advantage."
    )
    columns = ["What", *(run.name for run in runs), "What helps"]
    return Table("Compute that taught nothing", columns, rows, note)
