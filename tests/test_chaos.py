"""Who is who below a run, and what a comparison of two runs finds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest

from miles_lite import cli
from miles_lite.chaos.compare import Comparison, compare
from miles_lite.chaos.processes import kind_of

PYTHON, RAYLET = ["python"], ["/ray/core/src/ray/raylet/raylet", "--x"]
ZYGOTE = ["python", "-c", "from miles_lite.rollout.reward_worker import main; main()"]
DRIVER = ["python", "-m", "miles_lite.cli", "train", "experiment=tiny"]


@pytest.mark.parametrize(
    ("command", "parent", "kind"),
    [
        (["ray::MegatronWorker.step   "], RAYLET, "trainer"),
        (["ray::MegatronWorker"], RAYLET, "trainer"),
        (["ray::MegatronWorker.save"], ["ray::MegatronWorker.save "], ""),  # it writes a file
        (["ray::EngineRank.generate"], RAYLET, "engine"),
        (["ray::SGLangRank"], RAYLET, "engine"),
        (["ray::IDLE"], RAYLET, ""),
        (RAYLET, DRIVER, "node"),
        (["/ray/core/src/ray/gcs/gcs_server"], DRIVER, "gcs"),
        (DRIVER, PYTHON, "driver"),
        ([*DRIVER[:4], "--supervise"], PYTHON, ""),
        (["python", "-m", "miles_lite.launch.guard", *DRIVER], PYTHON, ""),
        (ZYGOTE, DRIVER, ""),
        (ZYGOTE, ZYGOTE, "reward"),
    ],
)
def test_processes_are_known_by_their_commands(
    command: list[str], parent: list[str], kind: str
) -> None:
    assert kind_of(command, parent) == kind


SAMPLE = {
    "step": 0, "prompt_uid": "a:1", "prompt": "", "label": "", "response": "", "tokens": [1, 2],
    "logprobs": [0.0, 0.0], "trainer_logprobs": [], "reward": 1.0, "invalid": "", "version": 0,
    "finish": "stop",
}  # fmt: skip


def write(run: Path, step: int, *changes: dict[str, object]) -> None:
    lines = [json.dumps({**SAMPLE, "step": step, **change}) for change in changes]
    (run / "samples").mkdir(parents=True, exist_ok=True)
    with gzip.open(run / f"samples/step_{step:06d}.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Equal ones."""
    run = tmp_path / "one"
    for step in (0, 1):
        write(run, step, {}, {"tokens": [3]})
    logged = [{"step": step, "train/loss": 0.5 + step, "perf/step_time": 1.0} for step in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    (run / "hf").mkdir()
    (run / "hf/model.safetensors").write_bytes(b"weights")
    shutil.copytree(run, tmp_path / "other")
    return run, tmp_path / "other"


def test_equal_runs_are_equal(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    assert found.same and found == Comparison(4, 0, 0, {}, True)


def test_a_lost_a_doubled_and_another_sample_are_found(two: tuple[Path, Path]) -> None:
    run, wanted = two
    write(run, 0, {}, {"tokens": [3]}, {"tokens": [3]})  # one twice
    (run / "samples/step_000001.jsonl.gz").unlink()  # two not at all
    found = compare(run, wanted)
    assert (found.lost, found.doubled, found.same) == (2, 1, False)
    write(run, 0, {}, {"tokens": [3], "reward": 0.0})
    write(run, 1, {}, {"tokens": [3]})
    found = compare(run, wanted)
    assert (found.lost, found.doubled, found.same) == (1, 1, False)


def test_other_metrics_and_weights_are_found(two: tuple[Path, Path]) -> None:
    run, wanted = two
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().replace("1.5", "1.25"))
    found = compare(run, wanted)
    assert dataclasses.asdict(found)["differing"] == {"train/loss": 1} and not found.same
    log.write_text((wanted / "metrics.jsonl").read_text())
    (run / "hf/model.safetensors").write_bytes(b"others")
    assert not compare(run, wanted).weights_equal
    (wanted / "hf/model.safetensors").unlink()
    (run / "hf/model.safetensors").unlink()
    assert not compare(run, wanted).weights_equal  # there are none


def test_what_is_not_there_cannot_be_killed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chaos", "experiment=tiny", "--kill", "engine,motor"]) == 2
    assert "--kill motor: there are engine, trainer" in capsys.readouterr().err
