"""Prompts are dealt in a seeded order that any position can go on from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_lite.config import SourceConfig
from miles_lite.data.prompts import PromptSource
from miles_lite.data.source import RenderSettings, Source, open_source
from miles_lite.data.tokenizer import ChatTokenizer

Make = Any  # (name, number of rows, number of rows that are too long) -> Source


@pytest.fixture(scope="session")
def make(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("prompts")
    render = RenderSettings(
        tokenizer, {}, max_prompt_tokens=20, max_too_long_ratio=0.9, rewards={""}
    )

    def source(name: str, num_rows: int, num_long: int = 0, label: str = "x") -> Source:
        path = folder / f"{name}-{num_rows}-{num_long}-{label}.jsonl"
        rows = [
            {"prompt": "What is 1+1?" * (10 if i < num_long else 1), "label": f"{label}{i}"}
            for i in range(num_rows)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_source(name, SourceConfig(path=str(path)), render)

    return source


def deal(source: PromptSource, n: int) -> list[str]:
    return [prompt.uid for prompt in source.take(n)]


def one(make: Make, num_rows: int, seed: int = 1, num_long: int = 0) -> PromptSource:
    return PromptSource([make("set", num_rows, num_long)], [1.0], seed)


def test_an_epoch_deals_every_prompt_once(make: Make) -> None:
    source = one(make, 10)
    dealt = [uid for _ in range(10) for uid in deal(source, 3)]  # three epochs
    epochs = [dealt[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == [f"set:{i}" for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # in a new order each time


def test_take_may_be_larger_than_an_epoch(make: Make) -> None:
    dealt = deal(one(make, 3), 7)
    assert sorted(dealt[:3]) == sorted(dealt[3:6]) == ["set:0", "set:1", "set:2"]


def test_long_prompts_are_never_dealt(make: Make) -> None:
    source = one(make, 10, num_long=4)
    dealt = deal(source, 12)
    assert Counter(dealt) == {f"set:{i}": 2 for i in range(4, 10)}


def test_seed_and_name_decide_the_order(make: Make) -> None:
    first, same, other = (deal(one(make, 50, seed), 50) for seed in (1, 1, 2))
    assert first == same != other
    named = PromptSource([make("other", 50)], [1.0], 1)
    assert [uid.split(":")[1] for uid in deal(named, 50)] != [uid.split(":")[1] for uid in first]


def test_a_mixture_keeps_its_shares_at_every_moment(make: Make) -> None:
    weights = {"a": 5.0, "b": 2.0, "c": 0.5}
    sources = [make(name, size) for name, size in (("a", 10), ("b", 30), ("c", 4))]
    mixture = PromptSource(sources, list(weights.values()), 7)
    dealt = [uid.split(":")[0] for uid in deal(mixture, 150)]
    for end in range(1, 151):
        counts = Counter(dealt[:end])
        for name, weight in weights.items():
            assert abs(counts[name] - end * weight / 7.5) <= 1.5, (end, counts)
    assert Counter(dealt) == {"a": 100, "b": 40, "c": 10}


def test_each_source_of_a_mixture_is_dealt_as_if_alone(make: Make) -> None:
    mixture = PromptSource([make("set", 10), make("b", 7)], [2.0, 1.0], 1)
    of_set = [uid for uid in deal(mixture, 36) if uid.startswith("set:")]
    assert of_set == deal(one(make, 10), len(of_set))


def test_prompts_put_back_come_again(make: Make) -> None:
    source = PromptSource([make("a", 5), make("b", 3)], [1.0, 2.0], 1)
    first = deal(source, 20)  # over epochs of both
    for back, (start, _) in zip((3, 17, 0, 20), pairwise((17, 3, 20, 0, 0)), strict=True):
        source.put_back(back)
        assert deal(source, back) == first[start if back else 20 :][:back]


SMALL = st.integers(0, 9)
SIZES = ((5, 1.0), (3, 2.0), (1, 0.3))


def mixture(make: Make, seed: int = 3) -> PromptSource:
    sources = [make(f"s{i}", size) for i, (size, _) in enumerate(SIZES)]
    return PromptSource(sources, [weight for _, weight in SIZES], seed)


@settings(max_examples=60)
@given(taken=st.lists(SMALL, max_size=6), back=SMALL, other=SMALL)
def test_going_on_from_any_position(
    make: Make, taken: Sequence[int], back: int, other: int
) -> None:
    source = mixture(make)
    for n in taken:
        source.take(n)
    source.put_back(min(back, sum(taken)))
    state = json.loads(json.dumps(source.state()))
    resumed = mixture(make)
    resumed.take(other)  # whatever it did before
    resumed.restore(state)
    assert resumed.state() == state
    assert deal(resumed, 25) == deal(source, 25)


def test_a_position_in_other_data_is_refused(make: Make) -> None:
    a, b = make("a", 10), make("b", 10)
    state = PromptSource([a, b], [1.0, 1.0], 3).state()
    others = {
        "seed": PromptSource([a, b], [1.0, 1.0], 4),
        "data sets": PromptSource([b, a], [1.0, 1.0], 3),
        "weight of data set b": PromptSource([a, b], [1.0, 2.0], 3),
        "num_rows of data set a": PromptSource([make("a", 11), b], [1.0, 1.0], 3),
        "fingerprint of data set a": PromptSource([make("a", 10, 0, "y"), b], [1.0, 1.0], 3),
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"cannot resume: .* has {what} = "):
            other.restore(state)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ({"position": 11}, "damaged: epoch = 0, position = 11"),
        ({"epoch": -1}, "epoch = -1"),
        ({"num_dealt": None}, "num_dealt = None"),
        ({"num_dealt": 2**63}, "num_dealt = 9223372036854775808"),
    ],
)
def test_a_damaged_position_is_refused(make: Make, damage: Any, complaint: str) -> None:
    source = one(make, 10)
    state = source.state()
    state["sources"]["set"] |= damage
    with pytest.raises(ValueError, match=f"cannot resume: .*{complaint}"):
        source.restore(state)


@pytest.mark.parametrize("sources", [None, [], "set", {"set": [1]}, {"set": None}, {"other": {}}])
def test_a_position_of_other_types_is_refused(make: Make, sources: Any) -> None:
    source = one(make, 10)
    with pytest.raises(ValueError, match="cannot resume: the saved prompt position has"):
        source.restore(source.state() | {"sources": sources})


def test_a_refused_position_leaves_the_source_as_it_was(make: Make) -> None:
    source, same = mixture(make), mixture(make)
    state = source.state()
    state["sources"]["s0"]["position"] = 3
    state["sources"]["s1"]["position"] = 99
    with pytest.raises(ValueError, match="position = 99"):
        source.restore(state)
    assert deal(source, 10) == deal(same, 10)


def test_no_source_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one data set"):
        PromptSource([], [], seed=0)


def test_a_position_is_small_whatever_was_dealt(make: Make, tmp_path: Path) -> None:
    source = one(make, 10)
    source.take(1000)
    assert len(json.dumps(source.state())) < 300
