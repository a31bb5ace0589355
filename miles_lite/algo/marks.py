"""What rewards look for in an answer. Where none has the mark, none can score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_lite.config import RewardConfig, RewardFunction
from miles_lite.types import Sample


@dataclass(frozen=True, slots=True)
class Mark:
    name: str  # as a person is told of it
    pattern: re.Pattern[str]

    def is_in(self, sample: Sample) -> bool:
        return self.pattern.search(sample.text) is not None


BOXED = Mark(r"\boxed", re.compile(r"\\boxed\b"))
ANSWER = Mark("Answer:", re.compile(r"answer\s*:", re.IGNORECASE))
THINK_END = Mark("</think>", re.compile("</think>"))
_FINAL = Mark("</think> or ###Response", re.compile("</think>|###Response"))

# By the name of a reward of ours, which gives nothing to an answer that lacks one of these.
_WANTED: Mapping[str, tuple[Mark, ...]] = {
    "deepscaler": (_FINAL, BOXED),
    "math": (BOXED,),
    "brevity": (BOXED,),
    "dapo_math": (ANSWER,),
}


def wanted_marks(reward: RewardConfig) -> dict[str, tuple[Mark, ...]]:
    """Of the rewards that look for any, by their names: those of `RewardConfig.functions`."""
    found = {name: _marks_of(function) for name, function in reward.functions.items()}
    return {name: marks for name, marks in found.items() if marks}


def _marks_of(reward: RewardFunction) -> tuple[Mark, ...]:
    if reward.function == "exact" and (text := str(reward.options.get("marker", ""))):
        return (Mark(text, re.compile(re.escape(text))),)
    if reward.function == "dapo_math" and reward.options.get("strict"):
        return (BOXED,)
    return _WANTED.get(reward.function, ())


def wanted_shares(
    samples: Sequence[Sample], wanted: Mapping[str, Sequence[Mark]]
) -> dict[str, float]:
    """By reward: the share of its answers with all marks that it wants; of the run's own, "own"."""
    shares = {}
    for reward, marks in wanted.items():
        mine = [sample for sample in samples if sample.prompt.reward == reward]
        if mine:
            having = sum(all(mark.is_in(sample) for mark in marks) for sample in mine)
            shares[reward or "own"] = having / len(mine)
    return shares
