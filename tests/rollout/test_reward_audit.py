"""Rewards that could never be won, or that wrong answers win, are found before any training."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from miles_lite.config import RewardFunction
from miles_lite.rollout.probes import Kind, Thinking, how_it_thinks
from miles_lite.rollout.reward_audit import Section, audit
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.types import Prompt

ROOT = Path(__file__).parents[2]

ASKED = "What is 17+17?<|im_end|>\n"
OPENED = ASKED + "<|im_start|>assistant\n<think>\n"
CLOSED = ASKED + "<|im_start|>assistant\n<think></think>"
UNSAID = "Not <think></think>. " + ASKED + "<|im_start|>assistant\n"

OWN = """
import os, time

def always(response, label): return 1.0
def below_zero(response, label): return 1.0 if f"Answer: {label}" in response else -1.0
def blind(response, label): return float(response == label + "<|im_end|>")
def gullible(response, label): return float("boxed" in response)
def raises(response, label): return {}[label]
def by_length(response, label):
    return (f"boxed{{{label}}}" in response) * (1.0 - 0.01 * len(response))
def ranked(responses, label):
    return [float(f"boxed{{{label}}}" in response) for response in responses]
def fragile(response, label):
    if "99999999!" in response: os._exit(1)
    if "9**9" in response: time.sleep(60)
    return float(f"boxed{{{label}}}" in response)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def report(
    file: Path,
    function: str,
    text: str,
    *labels: str,
    knows: bool = True,
    options: dict[str, Any] | None = None,
) -> Section:
    reward = RewardFunction(file=file, function=function, options=options or {})
    prompts = [
        Prompt(f"set:{i}", (), text, label, "", {}) for i, label in enumerate(labels or ("34",))
    ]
    with RewardWorkers({"": reward}, 2, RewardLimits(timeout_s=2.0)) as workers:
        (section,) = asyncio.run(audit(prompts, workers, knows))
    return section


def shipped(name: str, text: str, *labels: str, **more: Any) -> Section:
    return report(ROOT / f"rewards/{name}.py", name, text, *labels, **more)


@pytest.mark.parametrize(
    ("text", "knows", "thinking"),
    [
        (OPENED, True, Thinking.opened),
        (CLOSED, False, Thinking.closed),
        (UNSAID, True, Thinking.left),
        (UNSAID, False, Thinking.unknown),
    ],
)
def test_thinking_is_read_from_the_end_of_the_prompt(
    text: str, knows: bool, thinking: Thinking
) -> None:
    assert how_it_thinks(text, knows) is thinking


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("deepscaler", OPENED), ("deepscaler", UNSAID)],
        *[("math", OPENED), ("math", CLOSED), ("math", UNSAID)],
        *[("dapo_math", OPENED), ("dapo_math", CLOSED)],
    ],
)
def test_rewards_that_fit_pass(name: str, text: str) -> None:
    section = shipped(name, text, "34", "-7", "1000")
    assert section.failure == ""
    assert section.winning(Kind.right) == ["Answer:" if name == "dapo_math" else "\\boxed{}"]
    assert section.false_negatives == 0
    assert section.winning(Kind.wrong) == section.winning(Kind.hostile) == []


@pytest.mark.parametrize(
    ("text", "knows", "why"),
    [
        (CLOSED, True, r"<think></think>'\): .*which the prompt itself has already closed"),
        (UNSAID, False, "which the model never writes: neither its tokenizer nor its template"),
    ],
)
def test_a_reward_behind_thinking_without_thinking(text: str, knows: bool, why: str) -> None:
    section = shipped("deepscaler", text, knows=knows)
    assert section.hopeless
    with pytest.raises(ValueError, match=f"deepscaler can never be won .*{why}.*math.*thinking on"):
        raise ValueError(section.failure)


def test_a_marker_that_may_never_be_written_is_a_warning() -> None:
    section = shipped("deepscaler", UNSAID)
    (warning,) = section.warnings
    assert "stays 0 unless the model writes the markers on its own" in warning
    assert not section.failure


def test_a_reward_blind_behind_thinking(own: Path) -> None:
    assert "blind can never" in (failure := report(own, "blind", OPENED).failure)
    assert "thinking off" in failure
    assert report(own, "blind", CLOSED).winning(Kind.right) == ["bare"]


@pytest.mark.parametrize("function", ["always", "raises"])
def test_right_answers_that_get_no_more_than_silence(own: Path, function: str) -> None:
    failure = report(own, function, OPENED).failure
    assert f"reward {function} gives a right answer no more than an empty one" in failure
    assert ("(no verdict: error: KeyError)" in failure) == (function == "raises")


def test_rewards_may_start_below_zero(own: Path) -> None:
    assert not report(own, "below_zero", CLOSED).failure


def test_graded_rewards_count_as_won_when_they_pay_as_for_the_best(own: Path) -> None:
    section = report(own, "by_length", CLOSED)
    assert not section.failure
    assert section.winning(Kind.right) == ["\\boxed{}"]


def test_labels_that_do_not_fit_are_named() -> None:
    section = shipped("math", CLOSED, "34", "\\frac{1}{", "35")
    assert not section.hopeless  # so a run may start
    assert "can never be won for 1 of 3 prompts, as for set:1, whose label" in section.failure
    assert shipped("dapo_math", CLOSED, "(A) yes or no").failure  # no label for it


def test_a_reward_that_pays_for_wrong_answers(own: Path) -> None:
    section = report(own, "gullible", CLOSED)
    assert "pays for wrong answers (\\boxed{})" in section.failure
    assert section.false_positives > 0.3
    assert any("pays for hostile answers: empty box" in warning for warning in section.warnings)


def test_answers_cut_in_a_thought() -> None:
    (warning,) = shipped("math", OPENED).warnings
    assert "pays for cut answers: \\boxed{} in a thought" in warning
    assert not shipped("deepscaler", OPENED).warnings


def test_a_prompt_that_asks_for_what_is_not_looked_for() -> None:
    asks = "17+17? End with 'Answer: ...'.<|im_end|>\n<|im_start|>assistant\n<think></think>"
    (warning,) = shipped("math", asks).warnings
    assert "the prompts ask for Answer:, but reward math pays for \\boxed{} only" in warning
    assert not shipped("dapo_math", asks).warnings


def test_hostile_answers_cost_nobody_else_a_verdict(own: Path) -> None:
    section = report(own, "fragile", CLOSED)
    assert not section.failure
    assert section.reasons == {"crash": 1, "timeout": 1}
    counts = section.counts(Kind.hostile)
    assert counts["factorial", False] == counts["tower of powers", False] == {"no verdict": 1}
    assert counts["code", False] == {"lost": 1}


def test_a_reward_that_scores_groups(own: Path) -> None:
    section = report(own, "ranked", CLOSED, "34", "35")
    assert (section.failure, section.winning(Kind.right)) == ("", ["\\boxed{}"])


def test_sources_and_rewards_have_sections_of_their_own() -> None:
    rewards = {
        name: RewardFunction(file=ROOT / f"rewards/{name}.py", function=name)
        for name in ("math", "exact")
    }
    places = (("a", "math"), ("a", "exact"), ("b", "math"), ("a", "math"))
    prompts = [
        Prompt(f"{source}:{i}", (), CLOSED, "34", reward, {})
        for i, (source, reward) in enumerate(places)
    ]
    with RewardWorkers(rewards, 1) as workers:
        sections = asyncio.run(audit(prompts, workers, True))
    assert [(s.source, s.reward, len(s.graded)) for s in sections] == [
        *(("a", "math", 2), ("a", "exact", 1), ("b", "math", 1))
    ]


def test_the_matrix_says_what_was_counted() -> None:
    lines = list(shipped("math", CLOSED, "34", "35").lines())
    assert lines[0].startswith("set: 2 prompts, reward math, the template closes the think block")
    table = {line[2:42].strip(): line[42:].split() for line in lines[2:-1]}
    assert table["right     \\boxed{}"] == ["2", "0", "0"]
    assert table["right     Answer:"] == ["0", "2", "0"]
    assert table["wrong     \\boxed{}"] == ["0", "2", "0"]
    assert table["hostile   open braces"] == ["0", "1", "0"]
    assert "false negatives 0.0% of right answers as \\boxed{}" in lines[-1]
