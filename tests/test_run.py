"""The run folder: nothing is overwritten, nothing is half written, everything reads back."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_lite import environment, log, resume
from miles_lite import run as run_module
from miles_lite.claim import RunFinished
from miles_lite.compose import build
from miles_lite.config import CheckpointConfig, Config, ConfigError
from miles_lite.protocols import StepResult
from miles_lite.records import read_mapping
from miles_lite.run import Run, RunError, read_metrics, read_samples
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, TrainSequence, Verdict

NOW = datetime(2025, 1, 2, 3, 4, 5)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    raw = {
        "experiment": "test",
        "model": {"path": "model"},
        "train": {"num_steps": 2, "global_batch": 8},
        "data": {"train": "train.jsonl", "template_kwargs": {"think": True}},
        "rollout": {"num_prompts": 4, "samples_per_prompt": 2, "max_response_tokens": 16},
        "reward": {"file": "reward.py", "function": "score"},
        "log": {"folder": str(tmp_path / "runs")},
    }
    return build(Config, raw, "")


def named(cfg: Config, name: str) -> Config:
    return replace(cfg, log=replace(cfg.log, name=name))


def group(uid: int, logprobs: tuple[float, ...] = (-0.5, -1 / 3)) -> Group:
    text = f"prompt {uid} \u2028 \x1b"
    prompt = Prompt(f"set:{uid}", (1, 2), text, "42", reward="", metadata={})
    completion = Completion((7, 8), logprobs, version=3, finish=Finish.stop)
    right = Sample(prompt, completion, "it is 42", Verdict(1.0, ""))
    return Group((right, replace(right, text="???", verdict=Verdict(0.0, "timeout"))))


def seen(
    logprobs: Mapping[int, Sequence[float]], num_samples: int = 2
) -> tuple[StepResult, list[TrainSequence]]:
    """What the trainer said of a step's samples; every other one does not count."""
    told = {sample: np.array(values, np.float32) for sample, values in logprobs.items()}
    entropies = {sample: -values for sample, values in told.items()}
    sequences = [
        TrainSequence((1, 2, 7, 8), 2, (), i, i // 2, 1.0, advantage=1.5, counts=i % 2 == 0)
        for i in range(num_samples)
    ]
    return StepResult({}, told, entropies), sequences


def test_a_new_run_never_takes_the_folder_of_another(cfg: Config) -> None:
    names = [Run.open(cfg, NOW).folder.name for _ in range(3)]
    assert names == ["test-20250102-030405", "test-20250102-030405-2", "test-20250102-030405-3"]


# ------------------------------------------------------------------ going on


def test_a_named_run_that_stopped_is_taken_up_again(cfg: Config) -> None:
    mine = named(cfg, "mine")
    with Run.open(mine, NOW) as run:
        run.log(0, {"train/loss": 1.0})
        before = run.metrics_bytes
        run.log(1, {"train/loss": 2.0})
        run.save_samples(0, [group(0)], *seen({}))
        run.save_samples(1, [group(1)], *seen({}))
        run.save_eval(1, "held_out", [group(0)])
    with Run.open(mine, NOW) as again:
        assert again.folder == run.folder
        again.rewind(1, before)
        assert again.start == 1
        again.log(1, {"train/loss": 3.0})
    assert read_metrics(run.folder) == {0: {"train/loss": 1.0}, 1: {"train/loss": 3.0}}
    left = sorted(path.name for path in run.folder.rglob("step_*"))
    assert left == ["step_000000.jsonl.gz"]


def test_one_process_at_a_time_trains_a_run(cfg: Config) -> None:
    mine = named(cfg, "mine")
    with (
        Run.open(mine, NOW),
        pytest.raises(ConfigError, match=r"is being trained by process \d+ on .*log\.name"),
    ):
        Run.open(mine, NOW)
    Run.open(mine, NOW)


def test_a_run_of_other_settings_is_left_alone(cfg: Config) -> None:
    Run.open(named(cfg, "mine"), NOW).__exit__(None, None, None)
    other = replace(named(cfg, "mine"), optim=replace(cfg.optim, lr=0.5), seed=3)
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.5 \(was 1e-06\), seed = 3 \(was 0\)"):
        Run.open(other, NOW)


def test_where_and_how_long_may_change(cfg: Config) -> None:
    Run.open(named(cfg, "mine"), NOW).__exit__(None, None, None)
    other = replace(
        named(cfg, "mine"),
        parallel=replace(cfg.parallel, tp=2),
        train=replace(cfg.train, num_steps=99),
    )
    assert Run.open(other, NOW).folder.name == "mine"


def test_a_finished_run_is_not_trained_again(cfg: Config) -> None:
    with Run.open(named(cfg, "mine"), NOW) as run:
        run.finish({})
    with pytest.raises(RunFinished, match=r"finished its 2 steps: raise train\.num_steps"):
        Run.open(named(cfg, "mine"), NOW)
    longer = replace(named(cfg, "mine"), train=replace(cfg.train, num_steps=3))
    assert Run.open(longer, NOW).folder.name == "mine"


def test_checkpoints_are_due_by_steps_time_and_on_request(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("miles_lite.run.time.monotonic", lambda: now)
    run = Run.open(replace(cfg, checkpoint=CheckpointConfig(every=4, minutes=10)), NOW)
    assert [step for step in range(1, 9) if run.checkpoint_due(step)] == [4, 8]
    now = 600.0
    assert run.checkpoint_due(5)
    run.checkpoint_done()
    assert not run.checkpoint_due(5)
    (run.folder / "save_now").touch()
    assert run.checkpoint_due(5)
    run.checkpoint_done()
    assert not run.checkpoint_due(5) and not (run.folder / "save_now").exists()
    never = Run.open(replace(cfg, checkpoint=CheckpointConfig(every=0)), NOW)
    assert not any(never.checkpoint_due(step) for step in range(1, 100))


@pytest.mark.parametrize("name", ["../up", "a/b", ".."])
def test_a_name_is_not_a_path(cfg: Config, name: str) -> None:
    with pytest.raises(ConfigError, match="name = .* log.folder says"):
        Run.open(named(cfg, name), NOW)
    assert not cfg.log.folder.exists()


def test_config_reads_back_as_the_same_config(cfg: Config) -> None:
    both = [1, 2]  # YAML would write it once, and an alias
    shared = replace(cfg, reward=replace(cfg.reward, options={"a": both, "b": both}))
    folder = Run.open(shared, NOW).folder
    assert build(Config, read_mapping(folder / "config.yaml"), "") == shared


def test_a_config_that_doubles_itself_is_refused(cfg: Config) -> None:
    """Two to the power of 40 leaves in less than a kilobyte."""
    text = "a0: &a0 {x: 1}\n"
    text += "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 41))
    file = cfg.log.folder / "name" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read: it has aliases"):
        read_mapping(file)
    with pytest.raises(ConfigError, match=r"it has aliases .*: choose another log\.name"):
        Run.open(named(cfg, "name"), NOW)


def test_environment_tells_versions_and_no_secrets(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    text = (Run.open(cfg, NOW).folder / "environment.json").read_text()
    assert "very-secret" not in text
    found = json.loads(text)
    assert found["cpus"] >= 1 and found["memory_bytes"] > 0
    assert {"torch", "ray", "megatron-core", "transformers"} <= set(found["packages"])


def test_git_state_is_that_of_the_project_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package installed below somebody's checkout must not report that checkout's commit."""
    inner = tmp_path / "venv"
    inner.mkdir()
    answers = {"rev-parse --show-toplevel": str(tmp_path), "rev-parse --verify HEAD": "abc"}
    answers["status --porcelain"] = " M file"
    monkeypatch.setattr(environment, "output", lambda *words: answers[" ".join(words[3:])])
    monkeypatch.setattr(environment, "PROJECT", inner)
    assert environment.describe()["git"] is None
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    assert environment.describe()["git"] == {"commit": "abc", "dirty": True}


def test_metrics_read_back(cfg: Config) -> None:
    with Run.open(cfg, NOW) as run:
        run.log_eval(0, {"eval/mean": 0.25})
        run.log(0, {"train/loss": 1.5, "train/bad": math.nan})
        run.log(1, {"train/loss": 1.0, "train/bad": -math.inf})
        run.log(0, {"train/loss": 0.5})
    metrics = read_metrics(run.folder)
    assert list(metrics) == [0, 1]
    assert metrics[0]["eval/mean"] == 0.25
    assert metrics[0]["train/loss"] == 0.5  # the later line counts
    assert math.isnan(metrics[0]["train/bad"])
    assert metrics[1]["train/bad"] == -math.inf


def test_metrics_of_a_run_that_is_writing(cfg: Config) -> None:
    with Run.open(cfg, NOW) as run:
        run.log(0, {"train/loss": 1.5})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/lo')
    assert read_metrics(run.folder) == {0: {"train/loss": 1.5}}


def test_samples_read_back(cfg: Config) -> None:
    run = Run.open(cfg, NOW)
    groups = [group(0), group(5, logprobs=(math.nan, -1.0))]
    run.save_samples(12, groups, *seen({0: (-0.5, -0.25), 3: (-math.inf, -2.0)}, num_samples=4))
    run.settle()
    path = run.folder / "samples" / "step_000012.jsonl.gz"
    first, invalid, untrained, last = read_samples(path)
    assert (first.step, first.prompt_uid, first.label, first.version) == (12, "set:0", "42", 3)
    assert (first.prompt, first.response) == ("prompt 0 \u2028 \x1b", "it is 42")
    assert (first.reward, first.invalid, first.finish) == (1.0, "", "stop")
    assert list(first.tokens) == [7, 8]
    assert first.logprobs == pytest.approx((-0.5, -1 / 3), abs=1e-7)
    assert list(first.trainer_logprobs) == [-0.5, -0.25] and list(first.entropies) == [0.5, 0.25]
    assert first.advantage == 1.5 and math.isnan(invalid.advantage)
    assert (invalid.reward, invalid.invalid) == (0.0, "timeout")
    assert list(untrained.trainer_logprobs) == []
    assert math.isnan(last.logprobs[0]) and math.isnan(last.trainer_logprobs[0])
    for line in gzip.decompress(path.read_bytes()).splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_samples_that_cannot_be_written_are_told_before_the_next(cfg: Config) -> None:
    run = Run.open(cfg, NOW)
    (run.folder / "samples").write_text("no folder")
    run.save_samples(0, [group(0)], *seen({}))
    with pytest.raises(RunError, match="samples"):
        run.save_samples(1, [group(1)], *seen({}))


def test_a_checkpoint_waits_for_the_samples_before_it(cfg: Config) -> None:
    """Here they cannot be written, so it is never begun to be completed."""
    run = Run.open(cfg, NOW)
    (run.folder / "samples").write_text("no folder")
    run.saving = 1, {}
    run.save_samples(0, [group(0)], *seen({}))
    nobody: Any = None
    with pytest.raises(RunError, match="samples"):
        resume.complete(run, nobody)


def test_samples_of_an_earlier_version_still_read(tmp_path: Path) -> None:
    """Before there were advantages and entropies."""
    old = {
        "step": 0, "prompt_uid": "a:0", "prompt": "p", "label": "l", "response": "r", "tokens": [1],
        "logprobs": [-1.0], "trainer_logprobs": [], "reward": 1.0, "invalid": "", "version": 0,
        "finish": "stop",
    }  # fmt: skip
    path = tmp_path / "step_000000.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(old).encode() + b"\n"))
    (record,) = read_samples(path)
    assert math.isnan(record.advantage) and list(record.entropies) == []


def test_logprobs_keep_every_bit_of_a_float32(cfg: Config) -> None:
    numpy = pytest.importorskip("numpy")
    values = numpy.random.default_rng(0).normal(scale=3, size=200).astype("float32")
    as_tuple = tuple(float(value) for value in values)
    run = Run.open(cfg, NOW)
    run.save_samples(0, [group(0, logprobs=as_tuple)], *seen({0: as_tuple, 1: as_tuple}))
    run.settle()
    record = next(iter(read_samples(run.folder / "samples" / "step_000000.jsonl.gz")))
    assert (numpy.array(record.logprobs, "float32") == values).all()


def test_eval_samples_lie_apart_by_set(cfg: Config) -> None:
    run = Run.open(cfg, NOW)
    run.save_eval(4, "held_out", [group(0)])
    records = list(read_samples(run.folder / "eval" / "held_out" / "step_000004.jsonl.gz"))
    assert len(records) == 2
    assert list(records[0].trainer_logprobs) == []


def test_summary_tells_how_it_ended(cfg: Config) -> None:
    with Run.open(cfg, NOW) as run:
        run.finish({"steps": 2, "reward": math.nan})
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary == {"outcome": "finished", "steps": 2, "reward": "nan"}


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_an_error_is_kept_and_passed_on(cfg: Config, error: BaseException, outcome: str) -> None:
    run = Run.open(cfg, NOW)
    with pytest.raises(type(error)), run:
        raise error
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["outcome"] == outcome
    assert type(error).__name__ in summary["error"]


def test_a_full_disk_is_said_and_leaves_no_part(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(cfg, NOW)
    run.save_eval(0, "set", [group(0)])

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(RunError, match=r"set.*No space left on device.*MiB are free"):
        run.save_eval(1, "set", [group(0)])
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        run.log(0, {"train/loss": 1.0})
    names = [path.name for path in (run.folder / "eval" / "set").iterdir()]
    assert names == ["step_000000.jsonl.gz"]


def test_a_folder_that_cannot_be_made_is_said(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="runs"):
        Run.open(cfg, NOW)


def test_wandb_that_is_not_installed_is_said_before_anything_is_made(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise run_module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(run_module.metadata, "version", absent)
    wanted = replace(cfg, log=replace(cfg.log, wandb_project="p"))
    with pytest.raises(ConfigError, match="wandb"):
        Run.open(wanted, NOW)
    assert not cfg.log.folder.exists()


# ------------------------------------------------------------------ log.py


@contextmanager
def fresh_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def test_log_lines_name_the_speaker_and_steer_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with fresh_logging():
        log.setup("trainer", 1)
        log.setup("trainer", 3)  # replaces the first
        logging.getLogger("miles_lite.x").info("hello \x1b[2J %s", "\u202eworld")
        logging.getLogger("other").info("silent")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("trainer 3 INFO hello \\x1b[2J \\u202eworld")


def test_span_adds_up_and_survives_errors() -> None:
    seconds: dict[str, float] = {}
    with log.span("train", seconds):
        pass
    first = seconds["train"]
    with pytest.raises(ValueError), log.span("train", seconds):
        raise ValueError
    assert 0 <= first < seconds["train"] < 1
