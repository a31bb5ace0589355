"""Packing: nothing lost, nothing twice, the same work and the same count on every rank."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.algo.packing import pack, packing_metrics
from miles_lite.types import Batch, TrainSequence

CAP = 100  # above every drawn length


def sequences(lengths: list[tuple[int, int]]) -> list[TrainSequence]:
    """One for each (prompt_len, response_len)."""
    return [
        TrainSequence((1,) * (prompt + response), prompt, (-1.0,) * response, 0.0, sample)
        for sample, (prompt, response) in enumerate(lengths)
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[TrainSequence], dict[str, int]]:
    dp = draw(st.integers(1, 5))
    global_batch = dp * draw(st.integers(1, 6))
    count = global_batch * draw(st.integers(1, 3))
    length = st.tuples(st.integers(1, 9), st.integers(0, 80))
    lengths = draw(st.lists(length, min_size=count, max_size=count))
    sizes = {"dp": dp, "global_batch": global_batch, "max_tokens": draw(st.integers(1, 200))}
    return sequences(lengths), sizes | {"hard_cap": CAP}


@given(cases(), st.sampled_from(["sample", "token"]))
def test_what_holds_of_every_batch(case: tuple, aggregation: str) -> None:
    given_sequences, sizes = case
    batch = pack(given_sequences, **sizes, aggregation=aggregation)
    assert sorted(s.sample for s in batch.sequences) == list(range(len(given_sequences)))
    for u, update in enumerate(batch.updates):
        held = [s for rank in update.micro_batches for mb in rank for s in mb.sequences]
        first = u * sizes["global_batch"]
        assert {s.sample for s in held} == set(range(first, first + sizes["global_batch"]))
        assert len(update.micro_batches) == sizes["dp"]
        assert {len(rank) for rank in update.micro_batches} == {update.num_micro_batches}
        micro_batches = [mb for rank in update.micro_batches for mb in rank]
        for mb in micro_batches:
            assert mb.sequences
            assert mb.num_tokens <= sizes["max_tokens"] or len(mb.sequences) == 1
        for rank in update.micro_batches:  # those that meet across ranks are of a size
            sizes_here = [mb.num_tokens for mb in rank]
            assert sizes_here == sorted(sizes_here, reverse=True)
        loads = [sum(mb.num_tokens for mb in rank) for rank in update.micro_batches]
        assert max(loads) - min(loads) <= max(len(s.tokens) for s in held)
        total = sum(
            weight * s.response_len
            for mb in micro_batches
            for s, weight in zip(mb.sequences, mb.token_weights, strict=True)
        )
        told = sum(s.response_len > 0 for s in held) / len(held)
        spoken = sum(s.response_len for s in held) / sum(max(1, s.response_len) for s in held)
        assert total == pytest.approx(told if aggregation == "sample" else spoken)
    assert packing_metrics(batch)["perf/imbalance"] >= 1


@given(cases())
def test_packing_is_deterministic(case: tuple) -> None:
    given_sequences, sizes = case
    assert pack(given_sequences, **sizes, aggregation="token") == pack(
        given_sequences, **sizes, aggregation="token"
    )


def weights_of(batch: Batch) -> dict[int, float]:
    return {
        s.sample: weight
        for update in batch.updates
        for rank in update.micro_batches
        for mb in rank
        for s, weight in zip(mb.sequences, mb.token_weights, strict=True)
    }


def test_weights_by_hand() -> None:
    drawn = sequences([(1, 4), (5, 2), (2, 0), (2, 1)])
    sizes = {"dp": 1, "global_batch": 2, "max_tokens": 10, "hard_cap": 10}
    by_sample = weights_of(pack(drawn, **sizes, aggregation="sample"))
    assert by_sample == {0: 1 / 8, 1: 1 / 4, 2: 0.0, 3: 1 / 2}
    by_token = weights_of(pack(drawn, **sizes, aggregation="token"))
    assert by_token == {0: 1 / 6, 1: 1 / 6, 2: 0.0, 3: 1 / 2}  # the empty answer counts as one


def test_an_update_of_empty_answers_weighs_nothing() -> None:
    for aggregation in ("sample", "token"):
        batch = pack(
            sequences([(3, 0), (2, 0)]),
            dp=2,
            global_batch=2,
            max_tokens=8,
            hard_cap=8,
            aggregation=aggregation,
        )
        assert weights_of(batch) == {0: 0.0, 1: 0.0}


def test_a_long_sequence_stands_alone_and_ranks_still_match() -> None:
    """The even split would put the long one alone on a rank that then needs two micro-batches."""
    drawn = sequences([(1, 79)] + [(1, 9)] * 7)
    batch = pack(drawn, dp=2, global_batch=8, max_tokens=20, hard_cap=80, aggregation="sample")
    (update,) = batch.updates
    assert [len(rank) for rank in update.micro_batches] == [3, 3]
    alone = [mb for rank in update.micro_batches for mb in rank if mb.num_tokens > 20]
    assert [[s.sample for s in mb.sequences] for mb in alone] == [[0]]


def test_mixed_lengths_balance_nearly_perfectly() -> None:
    rng = random.Random(0)
    drawn = sequences([(100, min(4000, int(rng.expovariate(1 / 900)))) for _ in range(256)])
    batch = pack(drawn, dp=8, global_batch=128, max_tokens=4096, hard_cap=8192, aggregation="token")
    assert packing_metrics(batch)["perf/imbalance"] < 1.01
    tokens = sum(len(s.tokens) for s in drawn)
    slots = 8 * 4096 * packing_metrics(batch)["perf/num_micro_batches"]
    assert tokens / slots > 0.8


def test_imbalance_by_hand() -> None:
    drawn = sequences([(1, 5), (1, 1), (1, 3), (1, 3)])
    batch = pack(drawn, dp=2, global_batch=2, max_tokens=8, hard_cap=8, aggregation="token")
    # updates of (6, 2) and (4, 4) tokens: busiest 6 + 4, mean 4 + 4
    assert packing_metrics(batch) == {"perf/imbalance": 10 / 8, "perf/num_micro_batches": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 4}, "6 samples cannot be split into updates of 4"),
        ({"dp": 4, "global_batch": 6}, "6 samples on 4 DP ranks.*multiple of 4"),
        ({"dp": 8, "global_batch": 6}, "fewer samples than DP ranks"),
        (
            {"hard_cap": 11},
            r"sample 4 has 12 tokens \(2 prompt \+ 10 response\), over the cap of 11.*"
            "train.max_sequence_tokens.*train.max_tokens_per_micro_batch",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(change: dict[str, int], message: str) -> None:
    drawn = sequences([(2, 3)] * 4 + [(2, 10), (2, 3)])
    sizes = {"dp": 2, "global_batch": 6, "max_tokens": 8, "hard_cap": 12} | change
    with pytest.raises(ValueError, match=message):
        pack(drawn, **sizes, aggregation="sample")


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        pack([], dp=1, global_batch=1, max_tokens=8, hard_cap=8, aggregation="token")
