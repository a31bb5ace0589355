"""Thousands of verdicts measured by running the published graders, against ours.

A line of golden.jsonl.gz is [response, label, theirs, meant]. theirs[i] is what the published
grader behind GRADERS[i] returned, "none" where it raised or ran out of time; meant[i] is what ours
says instead, where it is meant to differ. docs/rewards.md has the kinds of differences and says how
theirs were run.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards.dapo_math import dapo_math
from rewards.deepscaler import deepscaler
from rewards.math import math
from rewards.math_verify import math_verify

GRADERS: dict[str, Callable[[str, str], float]] = {
    "deepscaler": deepscaler,
    "math": math,
    "dapo": dapo_math,
    "dapo strict": functools.partial(dapo_math, strict=True),
    "math_verify": math_verify,
}
NUM_ROWS = 12_269
NUM_MEANT = {"deepscaler": 3, "math": 3, "dapo": 5, "dapo strict": 0, "math_verify": 170}


@functools.cache
def rows() -> list[Any]:
    with gzip.open(Path(__file__).with_name("golden.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def grade(name: str, response: str, label: str) -> float | str:
    try:
        return GRADERS[name](response, label)
    except ValueError:
        return "none"


def compare(name: str, part: slice) -> None:
    index = list(GRADERS).index(name)
    different = []
    for response, label, theirs, meant in rows()[part]:
        if name == "math_verify" and theirs[index] == "none":
            continue  # out of time: so would ours be, and here is no process limit to end it
        wanted = meant.get(str(index), theirs[index])
        if (got := grade(name, response, label)) != wanted:
            different.append((response, label, got, wanted))
    assert not different, f"{len(different)} verdicts differ, such as {different[:3]}"


def test_the_file_is_whole() -> None:
    assert len(rows()) == NUM_ROWS
    for index, name in enumerate(GRADERS):
        theirs = [row[2][index] for row in rows()]
        wrong = -1 if name.startswith("dapo") else 0
        assert min(theirs.count(1), theirs.count(wrong)) > 1000, name
        assert sum(str(index) in row[3] for row in rows()) == NUM_MEANT[name]


@pytest.mark.parametrize("name", GRADERS)
def test_a_sample(name: str) -> None:
    compare(name, slice(3, None, 29 if name == "math_verify" else 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADERS)
def test_every_verdict(name: str) -> None:
    compare(name, slice(None))
