"""`miles-lite plan experiment=NAME [key=value ...]`: what a run needs, and whether it fits."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from miles_lite.compose import compose
from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import search
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.plan import make_plan, read_model, with_devices
from miles_lite.planner.show import WIDTH, show, write_html


class DoesNotFit(ValueError):
    """Memory, host memory or disk is missing; says what, where, how much, and a way out."""


def run(words: Sequence[str]) -> None:
    """Raises ConfigError for what cannot run at all, DoesNotFit for what has no room."""
    parser = argparse.ArgumentParser(prog="miles-lite plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="and as a page")
    parser.add_argument("--gpus", type=int, metavar="N", help="plan the layout on N devices")
    parser.add_argument("--gpu", metavar="NAME", help="hardware: of configs/hardware, or a file")
    parser.add_argument("--search", action="store_true", help="list layouts that fit")
    parser.add_argument(
        "--verify", action="store_true", help="build megatron's modules of every role and compare"
    )
    options = parser.parse_intermixed_args(words)
    cfg = compose(options.overrides)
    model, notes = read_model(cfg)
    hardware = Hardware.named(options.gpu or cfg.cluster.hardware)
    if options.gpu and hardware.name != "laptop":
        cfg = replace(cfg, cluster=replace(cfg.cluster, device="cuda"))
    if options.gpus:
        cfg = with_devices(cfg, options.gpus)
    plan = make_plan(cfg, model, hardware)
    if options.verify:
        notes.append(_verify(cfg, model))
    layouts = search.search(cfg, model, hardware) if options.search else []
    if options.json:
        options.json.write_text(json.dumps(plan.as_json(), indent=1, default=str) + "\n")
    if options.html:
        write_html(options.html, plan, notes, layouts)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    show(plan, notes, layouts, console)
    if not plan.fits:
        change = search.smallest_change(cfg, model, hardware)
        way_out = _hopeless(plan.num_devices)
        if change:
            way_out = f"it fits with {' '.join(change.changes)}"
        # the worst of each phase and kind of place
        worst = {(s.phase, s.where.split()[0]): str(s) for s in reversed(plan.shortages)}
        raise DoesNotFit("\n".join(["it does not fit:", *worst.values(), way_out]))


def _verify(cfg: Config, model: NemotronH) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch is not there yet
    from miles_lite.planner import verify

    begin, ranks = time.monotonic(), verify.ranks_of_every_role(cfg)
    found = verify.verify(cfg, model, ranks)
    return (
        f"verified: megatron's own modules of ranks {', '.join(str(v.rank) for v in found)} of "
        f"{cfg.parallel.dims.world_size} have the planned parameters, weight and gradient bytes "
        f"to the unit ({time.monotonic() - begin:.0f} s)"
    )


def _hopeless(num_devices: int) -> str:
    return f"no layout of {num_devices} such devices was found that fits: take more, or larger ones"
