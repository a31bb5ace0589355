"""A plan for people: tables in a terminal, or one page of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from miles_lite.planner.memory import PHASES, Item, total
from miles_lite.planner.plan import Plan
from miles_lite.planner.search import Layout

WIDTH = 120


def show(plan: Plan, notes: Sequence[str], layouts: Sequence[Layout], console: Console) -> None:
    """Everything, the answer last. notes: of how the plan was made; layouts: of a search."""
    names = {True: "fits", False: "does not fit"}
    console.print(
        f"[bold]{plan.experiment}[/]: {plan.num_params:,} parameters on {plan.num_devices} devices "
        f"of {plan.num_hosts} hosts ({plan.hardware.name})"
    )
    console.print(_roles(plan))
    console.print(_memory("Device memory of the fullest role, GB", _fullest(plan)))
    console.print(_memory("Memory of the fullest host, GB", plan.host))
    console.print(_disk(plan))
    console.print(_engines(plan))
    console.print(_traffic(plan))
    console.print(_time(plan))
    console.print(_assumptions(plan))
    if layouts:
        console.print(_layouts(layouts))
    for line in [*notes, *plan.warnings]:
        console.print(f"[yellow]note:[/] {line}")
    step = plan.step
    console.print(
        f"[bold]{plan.experiment} {names[plan.fits]}[/]; a step takes about "
        f"{_seconds(step.estimate_s)} (at least {_seconds(step.floor_s)}), "
        f"{plan.num_steps} steps {_seconds(step.estimate_s * plan.num_steps)} or "
        f"{step.estimate_s * plan.num_steps * plan.num_devices / 3600:,.0f} device hours"
    )


def write_html(path: Path, plan: Plan, notes: Sequence[str], layouts: Sequence[Layout]) -> None:
    console = Console(record=True, width=WIDTH, file=StringIO())
    show(plan, notes, layouts, console)
    path.write_text(console.export_html(), encoding="utf-8")


# ------------------------------------------------------------------ tables


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _roles(plan: Plan) -> Table:
    table = _table("Roles (counts are exact)", "ranks", "stage", "layers", "parameters", "experts")
    for role in plan.roles:
        layers = ", ".join(
            f"{role.pattern.count(kind)} {kind}" for kind in "M*E-" if kind in role.pattern
        )
        first, last = role.ranks
        counts = f"{role.num_params:,}", f"{role.num_expert_params:,}"
        table.add_row(f"{first} to {last}", str(role.stage), layers, *counts)
    return table


def _fullest(plan: Plan) -> Mapping[str, Sequence[Item]]:
    return {phase: max((role.device[phase] for role in plan.roles), key=total) for phase in PHASES}


def _memory(title: str, by_phase: Mapping[str, Sequence[Item]]) -> Table:
    table = _table(title, "", *PHASES)
    names = dict.fromkeys((i.party, i.what) for items in by_phase.values() for i in items)
    for party, what in names:
        cells = [
            sum(i.num_bytes for i in by_phase[phase] if (i.party, i.what) == (party, what))
            for phase in PHASES
        ]
        table.add_row(f"{party}: {what}", *(_gb(cell) if cell else "" for cell in cells))
    table.add_section()
    table.add_row("total", *(_gb(total(by_phase[phase])) for phase in PHASES), style="bold")
    return table


def _disk(plan: Plan) -> Table:
    table = _table("Shared disk, TB", "", "")
    for item in plan.disk:
        table.add_row(item.what, f"{item.num_bytes / 1e12:,.3f}")
    table.add_row("total", f"{total(plan.disk) / 1e12:,.3f}", style="bold")
    return table


def _engines(plan: Plan) -> Table:
    engine = plan.engine
    table = _table("Engines, one rank of them", "", "")
    for name, value in (
        ("engines", f"{engine.num_engines}"),
        ("parameters", f"{engine.num_params:,}"),
        ("weights", f"{_gb(engine.weight_bytes)} GB"),
        ("caches", f"{_gb(engine.pool_bytes)} GB"),
        ("keys and values of a token", f"{engine.kv_token_bytes:,} B"),
        ("Mamba state of a sequence", f"{engine.state_bytes / 1e6:,.1f} MB"),
        ("longest sequence", f"{engine.longest_sequence_bytes / 1e6:,.1f} MB"),
        ("longest sequences there is room for, in a group", f"{engine.capacity:,}"),
        ("sequences at once in a group", f"{engine.running:,}"),
        ("longest sequence that fits, with as many", f"{plan.longest_generated:,} tokens"),
        ("longest micro-batch that trains", f"{plan.longest_trained:,} tokens"),
    ):
        table.add_row(name, value)
    return table


def _traffic(plan: Plan) -> Table:
    table = _table(
        "Bytes that the busiest device sends or gets, GB", "phase", "NVLink", "network", "PCIe"
    )
    for phase in plan.step.phases:
        links = phase.links
        table.add_row(phase.phase, *map(_gb, (links.nvlink, links.network, links.pcie)))
    sync = plan.sync
    table.caption = (
        f"sync in all: {_gb(sync.total)} GB, of them {_gb(sync.local)} on the same device, "
        f"{_gb(sync.nvlink)} in a host, {_gb(sync.network)} between hosts"
    )
    return table


def _time(plan: Plan) -> Table:
    table = _table("Seconds of a step", "phase", "floor", "estimate", "of it")
    for phase in plan.step.phases:
        parts = ", ".join(
            f"{name} {seconds:,.1f}" for name, seconds in phase.parts.items() if seconds >= 0.05
        )
        table.add_row(phase.phase, f"{phase.floor_s:,.2f}", f"{phase.estimate_s:,.2f}", parts)
    table.columns[3].justify = "left"
    step = plan.step
    table.add_row("step", f"{step.floor_s:,.2f}", f"{step.estimate_s:,.2f}", "", style="bold")
    table.caption = (
        f"{step.num_micro_batches} micro-batches, {step.num_tokens:,} tokens; stages wait "
        f"{step.bubble:.0%} of the time; in flight by stage: "
        f"{', '.join(map(str, step.in_flight))}; a checkpoint takes {_seconds(step.save_s)}"
    )
    return table


def _assumptions(plan: Plan) -> Table:
    table = _table(
        f"What {plan.hardware.name} is taken for: configs/hardware",
        "kind",
        "name",
        "value",
        "meaning",
    )
    for section, name, value, meaning in plan.hardware.lines():
        kind = "data sheet" if section == "facts" else "ASSUMPTION"
        table.add_row(kind, name, f"{value:,g}", meaning)
    table.columns[3].justify = "left"
    return table


def _layouts(layouts: Sequence[Layout]) -> Table:
    table = _table("Layouts that fit, by estimated step time", "step", "overrides")
    for layout in layouts:
        table.add_row(_seconds(layout.step_s), " ".join(layout.changes) or "(as it is)")
    table.columns[1].justify = "left"
    return table


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def _seconds(seconds: float) -> str:
    if seconds < 300:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 10_000 else f"{seconds / 3600:,.1f} h"
