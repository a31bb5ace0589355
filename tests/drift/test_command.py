"""`miles-lite drift` on a run whose engine, or trainer, had other log-probs than it should have."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import SMALL, cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, a checkpoint behind each, and samples of steps 0 and 1."""
    folder = tmp_path_factory.mktemp("drift")
    words = ["experiment=tiny", "log.name=run", "train.num_steps=2", "checkpoint.every=1"]
    done = cli("train", *words, "eval.every=0", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


def shifted(run: Path, folder: Path, key: str) -> Path:
    """A copy in which all of those log-probs are 0.5 lower."""
    copy = folder / "a@b"  # where RUN@STEP is to be told from RUN
    shutil.copytree(run, copy)
    for file in (copy / "samples").iterdir():
        with gzip.open(file) as lines:
            records = [json.loads(line) for line in lines]
        for record in records:
            record[key] = [value - 0.5 for value in record[key]]
        with gzip.open(file, "wt") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)
    return copy


def drift(run: Path, step: str = "") -> dict[str, Any]:
    done = cli("drift", f"{run}{step}")
    assert done.returncode == 0, done.stderr
    return json.loads((run / "drift.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", ["", "@2"])
def test_a_sound_run_has_rounding(trained: Path, step: str) -> None:
    """Also where its samples are of the step before, and an update lies between."""
    told = drift(trained, step)
    assert told["step"] == (2 if step else 1)  # the newest that has samples of its own weights
    assert [cause["name"] for cause in told["causes"]] == ["rounding"]
    assert told["parts"]["run's answer: engine and trainer"] < 1e-4
    assert (told["parts"]["run's engine of step 1: now"] < 1e-4) == (told["step"] == 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", ["logprobs", "trainer_logprobs"])
def test_a_run_that_was_wrong_is_told_so(trained: Path, tmp_path: Path, key: str) -> None:
    side = "engine" if key == "logprobs" else "trainer"
    run = shifted(trained, tmp_path, key)
    told = drift(run)
    assert told["step"] == 1
    (cause,) = told["causes"]
    assert cause["name"] == f"weights or settings of the run's {side}"
    assert cause["size"] == pytest.approx(0.5, abs=1e-3)
    (cause,) = drift(run, "@2")["causes"]  # which of the two it is, an update may hide
    assert f"the run's {side}" in cause["name"] or cause["name"].startswith("not reproduced")
    assert cause["size"] == pytest.approx(0.5, abs=1e-3)
