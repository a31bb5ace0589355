"""`miles-lite eval --model DIR|RUN[@STEP] experiment=NAME [key=value ...]`: the sets of data.eval,
with the experiment's engine and rewards, without a trainer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from miles_lite import build
from miles_lite.compose import compose
from miles_lite.config import ConfigError
from miles_lite.log import say
from miles_lite.protocols import Metrics
from miles_lite.rollout.evaluate import evaluate
from miles_lite.run import Run
from miles_lite.weights.convert_command import model_folder


def run(words: Sequence[str]) -> None:
    """Leaves a run folder with the samples of each set and a summary.json, and prints a table."""
    parser = argparse.ArgumentParser(prog="miles-lite eval")
    parser.add_argument("--model", required=True, help="HF folder, or RUN, or RUN@STEP")
    options, overrides = parser.parse_known_args(words)
    cfg = compose(overrides)
    cfg = replace(
        cfg,
        experiment=f"eval-{cfg.experiment}",
        model=replace(cfg.model, path=model_folder(options.model)),
    )
    if not cfg.data.eval:
        raise ConfigError("data.eval is empty: name what to ask, data.eval=my.jsonl")
    inputs = build.check(cfg)
    found: dict[str, Metrics] = {}
    with Run.open(cfg, datetime.now()) as run:
        with build.start_evaluation(cfg, inputs, run.folder / "engines") as (rollout, sets):
            for eval_set in sets:
                metrics, groups = evaluate(rollout, eval_set)
                run.log_eval(0, metrics)
                run.save_eval(0, eval_set.name, groups)
                found[eval_set.name] = metrics
        numbers = {name: value for metrics in found.values() for name, value in metrics.items()}
        run.finish({"model": options.model, "run_folder": str(run.folder), "metrics": numbers})
    say("\n".join(table(found, {name: len(p) for name, p in inputs.eval_prompts.items()})))
    say(f"model       {options.model}\nrun folder  {Path(run.folder)}")


def table(found: dict[str, Metrics], num_prompts: dict[str, int]) -> list[str]:
    """A line for each estimate, with its 95 % interval."""
    lines = [f"{'set':<20}{'prompts':>8}  {'metric':<10}{'value':>8}   95 % interval"]
    for name, metrics in found.items():
        for metric, value in metrics.items():
            title = metric.removeprefix(f"eval/{name}-")
            if "@" not in title or title.endswith(("-low", "-high")):
                continue
            low, high = (metrics.get(f"{metric}{end}") for end in ("-low", "-high"))
            interval = "" if low is None or high is None else f"{low:.3f} .. {high:.3f}"
            lines.append(f"{name:<20}{num_prompts[name]:>8}  {title:<10}{value:>8.3f}   {interval}")
        cut = metrics[f"eval/{name}-truncated_ratio"]
        unsaid = metrics[f"eval/{name}-none_reward_ratio"]
        lines.append(f"{'':<30}{cut:.1%} cut by the length limit, {unsaid:.1%} without a verdict")
    return lines
