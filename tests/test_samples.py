"""`samples` and `replay` on a run folder made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from miles_lite import cli
from miles_lite.compose import CONFIGS, compose
from miles_lite.run import Run
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Verdict
from tests.report.planted import trained

REWARDS = CONFIGS.parent / "rewards"


def group(uid: str, label: str, answers: Sequence[tuple[str, float, str]]) -> Group:
    """answers: text, reward, reason for no verdict."""
    prompt = Prompt(uid, (1, 2), "<|im_start|>user\nWhat?", label, "", {})
    return Group(
        tuple(
            Sample(
                prompt,
                Completion((5, 6), (-0.1, -0.2), 0, Finish.stop),
                text,
                Verdict(reward, reason),
            )
            for text, reward, reason in answers
        )
    )


RIGHT, WRONG = ("</think>\\boxed{7}", 1.0, ""), ("</think>\\boxed{8}", 0.0, "")
HOSTILE = ("\x1b[2J\u202e[bold]Answer: 7", 0.0, "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    sizes = (
        "rollout.num_prompts=2 rollout.samples_per_prompt=2 train.global_batch=4 "
        "eval.samples_per_prompt=4"
    )
    place = f"log.folder={folder}"
    cfg = compose(["experiment=tiny", place, "log.name=run", *sizes.split()])
    with Run.open(cfg, datetime(2025, 1, 1)) as run:
        timeout = ("</think>\\boxed{9}", 0.0, "timeout")
        first = [group("a:1", "7", [RIGHT, WRONG])]
        run.save_samples(0, first, *trained(first))
        third = [*first, group("a:2", "7", [HOSTILE, timeout])]
        run.save_samples(3, third, *trained(third))
        run.save_eval(3, "eval", [group("e:1", "7", [RIGHT, WRONG, WRONG, RIGHT])])
        run.finish({})
    return run.folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(words) == 0
    return capsys.readouterr().out


def test_samples_are_shown_and_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = said(capsys, "samples", str(run))
    assert "4 of 4 samples" in everything and "step_000003" in everything
    assert "2 of 2 samples" in said(capsys, "samples", f"{run}@0")
    assert "2 of 2 samples" in said(capsys, "samples", str(run), "--step", "0")
    assert "4 of 4 samples" in said(capsys, "samples", str(run), "--set", "eval")
    for words, number in [
        ("--reward 1", 1), ("--reward 0..0.5", 3), ("--reward 0.5..", 1),
        ("--invalid", 1), ("--uid a:2", 2), ("--uid a:2 --reward 1", 0),
    ]:  # fmt: skip
        assert f"{number} of {number} samples" in said(capsys, "samples", str(run), *words.split())
    assert "1 of 4 samples" in said(capsys, "samples", str(run), "--num", "1")
    assert "timeout" in said(capsys, "samples", str(run), "--invalid")


@pytest.mark.parametrize("how", [[], ["--full"]])
def test_a_sample_cannot_steer_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    shown = said(capsys, "samples", str(run), "--uid", "a:2", *how)
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "\\x1b[2J\\u202e[bo" in shown  # nor is it read as markup


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("samples {run}@1", "no step 1; there are 2, 0 to 3"),
        ("samples {run}@last", "'last' is not a step"),
        ("samples {run} --set other", "evaluation sets of this run (--set): eval"),
        ("samples {run} --reward high", "wanted X, X.., ..Y or X..Y"),
        ("replay {run} --reward exact", "wanted FILE:FUNCTION"),
        ("replay {run} --reward nothing.py:f", "no reward file"),
        ("replay {run} --reward {rewards}/exact.py:exakt", "did you mean 'exact'"),
        ("replay {run} --reward {rewards}/exact.py:exact --option mark=x", "no option 'mark'"),
    ],
)
def test_mistakes_are_told(
    run: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    assert cli.run(words.format(run=run, rewards=REWARDS).split()) == 2
    assert told in capsys.readouterr().err


def test_the_same_reward_changes_nothing_but_what_had_no_verdict(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = f"{REWARDS}/deepscaler.py:deepscaler"
    assert "0 of 2 verdicts change" in said(capsys, "replay", f"{run}@0", "--reward", reward)
    told = said(capsys, "replay", str(run), "--reward", reward)
    assert "1 of 4 verdicts change" in told and "a:2, label 7: timeout -> 0" in told
    assert told.splitlines()[2:6] == [
        "old / new           pass        fail  no verdict",
        "pass                   1           0           0",
        "fail                   0           2           0",
        "no verdict             0           1           0",
    ]


def test_another_reward_by_group_with_options(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def rank(responses, label, step: float = 1.0, prompt=''):\n"
        "    assert prompt.startswith('<|im_start|>')\n"
        "    return [step * i for i, _ in enumerate(responses)]\n"
        "def needy(response, label, metadata):\n"
        "    return 0.0\n"
    )
    words = ["replay", str(run), "--reward", f"{own}:rank", "--option", "step=0.5"]
    told = said(capsys, *words)
    assert "3 of 4 verdicts change, 2 of them" in told and "-> 0.2500" in told
    assert "\x1b" not in told
    # an evaluation has its own number of samples: one group of 4, not two of 2
    told = said(capsys, *words, "--set", "eval", "--pass-reward", "0.9")
    assert "-> 0.7500" in told
    assert cli.run(["replay", str(run), "--reward", f"{own}:needy"]) == 2
    assert "samples do not keep" in capsys.readouterr().err
