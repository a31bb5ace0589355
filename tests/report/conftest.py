from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.planted import alarm, answers, group, plant


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, three alarms, four samples a step."""
    alarms = [alarm(2, "drift"), alarm(1, "drift"), alarm(4, "dead reward", "critical")]
    return plant(tmp_path_factory.mktemp("runs"), "small", 6, alarms=alarms)


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
