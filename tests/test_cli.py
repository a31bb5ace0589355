"""Commands that start nothing: what they print, and which runs they refuse."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from miles_lite import cli
from miles_lite.checkpoints import CheckpointError
from miles_lite.protocols import EngineError, RemoteError, RunError
from miles_lite.rollout.dynamic import NothingToKeep
from miles_lite.rollout.manager import RolloutError
from miles_lite.rollout.signal import NoSignalError
from miles_lite.stop import ENDED_ITSELF, AlarmError
from miles_lite.weights.transport import WeightSyncError


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(words) == 2
    return capsys.readouterr().err


def test_check_says_what_it_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "experiment=tiny"]) == 0
    assert "3000 training and 200 evaluation prompts, 2 devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        # a reward that is constant 0, or never varies
        ("data.template_kwargs.enable_thinking=false", "deepscaler can never be won"),
        ("reward.file=rewards/exact.py reward.function=exact +reward.options.marker=@@", "no more"),
        ("rollout.samples_per_prompt=1 rollout.num_prompts=128", "alone in its group"),
        # sizes that do not divide, and would be trimmed
        ("train.global_batch=100", "num_prompts x samples_per_prompt = global_batch x"),
        ("train.global_batch=60 rollout.num_prompts=15 rollout.samples_per_prompt=4 parallel.dp=8",
         "not a multiple of parallel.dp = 8"),
        # tokens that would not fit
        ("train.max_tokens_per_micro_batch=64", "do not fit a forward pass"),
        ("algo.overlong_buffer=4096", "leaves nothing of an answer"),
        # corrections of nothing, KL twice, a reference of nothing
        ("algo.old_logprobs=rollout algo.correction.weight=token", "nothing left to correct"),
        ("algo.kl_coef=0.1 algo.kl_loss_coef=0.1", "the same KL would count twice"),
        ("algo.ref_update_interval=5", "without a reference"),
        ("algo.advantage_estimator=reinforce_plus_plus", "set algo.whiten=true"),
        ("rollout.over_sampling=64", "nothing to choose from"),
        ("algo.train_zero_advantage=false algo.entropy_coef=0.01", "do have a gradient"),
        # sampling that cannot be corrected for
        ("rollout.temperature=0", "training needs samples"),
    ],
)  # fmt: skip
def test_misconfigured_runs_are_refused(
    capsys: pytest.CaptureFixture[str], overrides: str, complaint: str
) -> None:
    error = refusal(capsys, "check", "experiment=tiny", *overrides.split())
    assert complaint in error
    assert error.count("\n") == 1


def test_reward_audit_prints_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["reward-audit", "experiment=tiny"]) == 0
    out = capsys.readouterr().out
    assert "tiny: 16 prompts, reward deepscaler, the template opens a think block" in out
    assert "eval: 16 prompts" in out
    assert "false negatives 0.0% of right answers as \\boxed{}, false positives 0.0%" in out
    assert "warning" not in out


def test_reward_audit_fails_where_no_right_answer_can_score(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where `check` would let the run start: only some labels are at fault."""
    path = tmp_path / "words.jsonl"
    rows = [{"prompt": "?", "label": label} for label in ("1", "2", "\\frac{1}{")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["experiment=tiny", f"data.train={path}"]
    assert cli.run(["check", *words]) == 0
    error = refusal(capsys, "reward-audit", *words)
    assert "can never be won for 1 of 3 prompts, as for words:2, whose label" in error


@pytest.mark.parametrize(
    "error",
    [
        RunError("no room"), EngineError("engine 0 died"), RemoteError("trainer rank 0 died"),
        RolloutError("samples are missing"), WeightSyncError("other checksums"),
        NothingToKeep("equal rewards"), NoSignalError("all 0"), CheckpointError("damaged"),
        AlarmError("drift"), TimeoutError("no answer within 15 s"),
        OSError(errno.ENOSPC, "No space left on device", "runs/x"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_the_cause_of_a_failure_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(overrides: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_check", fail)
    assert cli.run(["check"]) == 1
    assert capsys.readouterr().err == f"miles-lite check: {error}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NothingToKeep("equal rewards"), ENDED_ITSELF),
        (NoSignalError("all 0"), ENDED_ITSELF),
        (AlarmError("drift"), ENDED_ITSELF),
        (CheckpointError("damaged"), ENDED_ITSELF),
        (RolloutError("samples are missing"), 1),
        (ValueError("no such key"), 2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_run_is_not_started_again_for_what_stays(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(overrides: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.run(["train"]) == code


def test_an_error_that_says_nothing_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(overrides: Sequence[str]) -> None:
        raise TimeoutError

    monkeypatch.setattr(cli, "_check", fail)
    with pytest.raises(TimeoutError):
        cli.run(["check"])
