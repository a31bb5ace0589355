"""`miles-lite wandb-dashboard`: a W&B workspace with what one wants to see of a run, in order."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from miles_lite.metrics import has_wandb_login, wandb_axis

# Section -> panel -> metrics drawn in it, against the axis that metrics.WandbSink gave them.
PANELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Reward": {
        "reward": ["rollout/raw_reward"],
        "what teaches": [
            "rollout/taught_ratio",
            "rollout/zero_advantage_ratio",
            "rollout/zero_std/all_zero_percentage",
            "rollout/zero_std/all_one_percentage",
        ],
        "no verdict": ["reward/invalid_ratio", "rollout/not_counted_ratio"],
        "marks in answers": [
            "rollout/marker/boxed",
            "rollout/marker/answer",
            "rollout/marker/think_end",
        ],
    },
    "Drift between engines and trainer": {
        "nats a token": [
            "train/train_rollout_logprob_abs_diff",
            "train/train_rollout_logprob_abs_diff_max",
        ],
        "KL": ["train/train_rollout_kl"],
        "log-probs not finite": ["train/nonfinite_logprobs"],
    },
    "Lengths": {
        "answer": [
            "rollout/response_len/mean",
            "rollout/response_len/median",
            "rollout/response_len/max",
        ],
        "cut or in circles": ["rollout/truncated_ratio", "rollout/repetition_frac"],
    },
    "Updates": {
        "loss": ["train/loss", "train/pg_loss"],
        "gradient norm": ["train/grad_norm"],
        "clipped": ["train/pg_clipfrac"],
        "policy against old": ["train/ppo_kl", "train/ess_ratio"],
        "entropy": ["train/token_entropy"],
        "learning rate": ["train/lr-pg_0"],
    },
    "Time": {
        "of a phase": [
            "perf/step_time",
            "perf/rollout_time",
            "perf/train_time",
            "perf/update_weights_time",
        ],
        "against the plan": [
            "plan/perf/rollout_time",
            "plan/perf/train_time",
            "plan/perf/update_weights_time",
        ],
        "tokens a second": ["perf/rollout_tokens_per_s", "perf/actor_train_tok_per_s"],
    },
    "Memory": {
        f"in {phase}": [
            f"memory/{phase}/{kind}_bytes"
            for kind in (
                "trainer_weights",
                "trainer_grads",
                "trainer_optimizer",
                "rollout_weights",
                "rollout_cache",
            )
        ]
        for phase in ("generate", "train", "sync")
    }
    | {
        "of the host": [
            f"memory/train/{party}_resident_bytes" for party in ("driver", "trainer", "rollout")
        ]
    },
}


def workspace(entity: str, project: str) -> Any:
    """The workspace, not yet saved. Raises ImportError without the library."""
    ws = import_module("wandb_workspaces.workspaces")
    reports = import_module("wandb_workspaces.reports.v2")
    sections = [
        ws.Section(
            name=section,
            is_open=True,
            panels=[
                reports.LinePlot(title=title, x=wandb_axis(names[0].split("/")[0]), y=list(names))
                for title, names in panels.items()
            ],
        )
        for section, panels in PANELS.items()
    ]
    return ws.Workspace(entity=entity, project=project, name="miles-lite", sections=sections)


def command(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("miles-lite wandb-dashboard", description=__doc__)
    parser.add_argument("--project", required=True, help="log.wandb_project of the runs")
    parser.add_argument("--entity", required=True, help="user or team that has the project")
    args = parser.parse_args(words)
    if not has_wandb_login():
        raise ValueError(
            "W&B knows nobody here: set WANDB_API_KEY in the environment, or run `wandb login`"
        )
    try:
        made = workspace(args.entity, args.project)
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'miles-lite[wandb]'") from None
    try:
        made.save()
    except Exception as error:  # the library's own kinds, and those of its transport
        raise ValueError(
            f"W&B did not take the workspace for {args.entity}/{args.project}: {error!r}"
        ) from error
    print(made.url)
