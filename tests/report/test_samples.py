"""Which samples travel, and in how many bytes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.report import samples
from miles_lite.report.runs import read_runs
from miles_lite.report.samples import choose, unpack


def test_all_travel_if_they_fit(small: Path) -> None:
    chosen = choose(read_runs([small]), 1_000_000)
    found = unpack(chosen.packed)
    assert chosen.told == "All 26 samples of the runs." and len(found) == 26
    assert {s["h"] for s in found} == {"", "held"} and {s["v"] for s in found} == {"", "timeout"}
    sample = next(s for s in found if s["s"] == 5 and s["w"] == 1)
    assert sample["d"][0] == 0.25 and all(0 <= drift <= 1e-3 for drift in sample["d"][1:])
    assert sample["n"] == pytest.approx([value**2 / 2 for value in sample["e"]], rel=1e-2)
    assert sample["a"] == 0.5 and sample["e"][0] == pytest.approx(-0.55, abs=0.05)
    unseen = next(s for s in found if s["s"] == 5 and s["v"])
    assert unseen["a"] == "nan" and unseen["d"] == []


@pytest.mark.slow
def test_a_budget_is_kept_and_spread_over_steps_and_kinds(large: Path) -> None:
    budget = 400_000
    chosen = choose(read_runs([large]), budget)
    found = unpack(chosen.packed)
    assert budget / 2 < len(chosen.packed) <= budget
    assert chosen.num_chosen == len(found) < chosen.num_seen == 10_002
    assert f"{len(found):,} of 10,002 samples" in chosen.told
    steps = {sample["s"] for sample in found}
    assert {0, 999} <= steps and len(steps) > 50
    assert max(b - a for a, b in pairwise(sorted(steps))) < 60
    assert {(s["v"], s["w"]) for s in found} >= {("", 0), ("", 1), ("", 0.5), ("timeout", 0)}


@pytest.mark.slow
def test_no_more_is_read_than_wanted(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "READ_BYTES", 200_000)
    chosen = choose(read_runs([large]), 10_000_000)
    assert chosen.num_files_read < 100 and "of 1,001 sample files" in chosen.told


def test_a_file_of_very_long_answers_is_not_read_whole(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "FILE_TOKENS", 6)  # two answers of five tokens and more
    chosen = choose(read_runs([small]), 1_000_000)
    assert chosen.num_chosen == chosen.num_seen == 14
    assert "14 of 14 samples read from 7 of 7 sample files" in chosen.told


def test_halving_names_each_place_once() -> None:
    for count in (0, 1, 2, 3, 10, 1000):
        assert sorted(samples._halving(count)) == list(range(count))
    assert samples._halving(9)[:3] == [0, 8, 4]


class Bytes(ChatTokenizer):
    """Each token is a byte of UTF-8."""

    def __init__(self) -> None: ...

    def decode(self, tokens: object) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("text", ["", "plain", "a\u00e9b", "\u20ac5 \U0001f600!", "cut \u20ac"])
def test_tokens_that_share_a_character(text: str) -> None:
    tokens = text.encode()
    pieces = samples._Pieces(Bytes()).of(tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == text
    cut = samples._Pieces(Bytes()).of(tokens[:-1])
    assert len(cut) == len(tokens[:-1])


def test_without_a_tokenizer_tokens_are_numbers(small: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples"):
        (tmp_path / name).symlink_to(small / name)
    chosen = choose(read_runs([tmp_path]), 1_000_000)
    first = unpack(chosen.packed)[0]
    assert first["t"][0] == "[30]" and first["x"].startswith("answer")
    assert "tokens are shown by number" in chosen.notes[0]
