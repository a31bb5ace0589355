from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.planted import answers, drift_found, group, looked_at, plant


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, two alarms, four samples a step."""
    drifts = looked_at(train__train_rollout_logprob_abs_diff=0.06)
    broken = looked_at(train__first_log_ratio=0.1)
    troubles = {0: drifts, 1: looked_at(), 2: drifts, 4: broken}
    folder = plant(tmp_path_factory.mktemp("runs"), "small", 6, troubles=troubles)
    (folder / "drift.json").write_text(json.dumps(drift_found("sampling truncation")))
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other settings, and still being written: no summary, half a line."""
    folder = plant(tmp_path_factory.mktemp("runs"), "other", 4, overrides=["optim.lr=0.125"])
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/raw')
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 steps and 10,000 samples of 60 to 180 tokens, a million in all."""
    tokens = [30 + (i * i) % 40 for i in range(60)]
    found = answers(10)
    groups = {
        step: [group(step, found[step % 4 :] + found[: step % 4], tokens)] for step in range(1000)
    }
    return plant(tmp_path_factory.mktemp("runs"), "large", 1000, groups)
