"""Sequences become the forward passes of each update: who computes what, with which weight.

Sequences are split into updates in rollout order. Within an update they are balanced over the
data-parallel ranks by token count, then packed on each rank into micro-batches. Every rank runs
the same number of micro-batches, none of them empty: pipeline and expert-parallel collectives run
once a micro-batch, and a rank with one more would wait for ever. All of it is deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

from miles_lite.protocols import Metrics
from miles_lite.types import Batch, MicroBatch, TrainSequence, Update

Aggregation = Literal["sample", "token"]
Part = list[TrainSequence]  # of a rank, or of a micro-batch


def pack(
    sequences: Sequence[TrainSequence],
    *,
    dp: int,
    global_batch: int,
    max_tokens: int,
    hard_cap: int,
    aggregation: Aggregation,
) -> Batch:
    """All updates of a step. Raises ValueError, before any training, for what cannot be packed.

    global_batch: sequences of an update.
    max_tokens: aim for a micro-batch; a longer sequence forms one of its own.
    hard_cap: tokens no sequence may exceed, so what a micro-batch of max(max_tokens, hard_cap)
        tokens needs is all the memory a step ever needs.
    """
    _check(sequences, dp=dp, global_batch=global_batch, hard_cap=hard_cap)
    updates = []
    for start in range(0, len(sequences), global_batch):
        chosen = sequences[start : start + global_batch]
        weights = _token_weights(chosen, aggregation)
        updates.append(
            Update(
                tuple(
                    tuple(
                        MicroBatch(tuple(part), tuple(weights[s.sample] for s in part))
                        for part in rank
                    )
                    for rank in _micro_batches(chosen, dp, max_tokens)
                )
            )
        )
    return Batch(tuple(updates))


def packing_metrics(batch: Batch) -> Metrics:
    """`perf/imbalance`: tokens of the busiest rank over the mean rank, summed over the updates.

    1 is perfect; 1.2 means that the average rank idles a sixth of the training time.
    """
    loads = [
        [sum(micro_batch.num_tokens for micro_batch in rank) for rank in update.micro_batches]
        for update in batch.updates
    ]
    mean = sum(sum(ranks) / len(ranks) for ranks in loads)
    return {
        "perf/imbalance": sum(max(ranks) for ranks in loads) / mean,
        "perf/num_micro_batches": float(sum(u.num_micro_batches for u in batch.updates)),
    }


def _check(
    sequences: Sequence[TrainSequence], *, dp: int, global_batch: int, hard_cap: int
) -> None:
    if not sequences or len(sequences) % global_batch:
        raise ValueError(
            f"{len(sequences)} samples cannot be split into updates of {global_batch}: "
            "prompts x samples per prompt must be a multiple of the global batch"
        )
    if global_batch % dp:
        fewer = "fewer samples than DP ranks, " if global_batch < dp else ""
        raise ValueError(
            f"an update of {global_batch} samples on {dp} DP ranks: {fewer}so the ranks cannot "
            f"all run the same number of micro-batches; make the global batch a multiple of {dp}"
        )
    assert len({s.sample for s in sequences}) == len(sequences), "a sample occurs twice"
    longest = max(sequences, key=lambda s: len(s.tokens))
    if len(longest.tokens) > hard_cap:
        raise ValueError(
            f"sample {longest.sample} has {len(longest.tokens)} tokens ({longest.prompt_len} "
            f"prompt + {longest.response_len} response), over the cap of {hard_cap}: raise "
            "train.max_sequence_tokens if the memory allows (train.max_tokens_per_micro_batch "
            "does not cut a sequence), or lower the prompt or response length"
        )


def _token_weights(update: Sequence[TrainSequence], aggregation: Aggregation) -> dict[int, float]:
    """Loss weight of each response token, by sample.

    "sample": mean over samples of the mean over their tokens; "token": mean over all tokens. A
    sample without response tokens counts as one in the denominator, and weighs nothing.
    """
    tokens = {s.sample: max(1, s.response_len) for s in update}
    if aggregation == "sample":
        weights = {sample: 1 / (num_tokens * len(update)) for sample, num_tokens in tokens.items()}
    else:
        assert aggregation == "token", f"no aggregation {aggregation!r}"
        weights = dict.fromkeys(tokens, 1 / sum(tokens.values()))
    return {s.sample: weights[s.sample] if s.response_len else 0.0 for s in update}


# ------------------------------------------------------------------ who computes what


def _micro_batches(update: Sequence[TrainSequence], dp: int, max_tokens: int) -> list[list[Part]]:
    """[dp][i] of micro-batches, the same number on each rank.

    The freest balance comes first. It may leave a rank with fewer sequences, all long, than another
    has micro-batches; then each rank gets the same number of sequences, which always works out.
    """
    ranks = _partition(update, dp)
    packed = [_first_fit_decreasing(rank, max_tokens) for rank in ranks]
    if min(map(len, ranks)) < max(map(len, packed)):
        ranks = _partition(update, dp, equal_counts=True)
        packed = [_first_fit_decreasing(rank, max_tokens) for rank in ranks]
    num_micro_batches = max(map(len, packed))
    for micro_batches in packed:
        while len(micro_batches) < num_micro_batches:
            divisible = [part for part in micro_batches if len(part) > 1]
            largest = max(divisible, key=_num_tokens)
            micro_batches.remove(largest)
            micro_batches += _partition(largest, 2)
        # Experts are exchanged across DP ranks: let those that meet have about the same size.
        micro_batches.sort(key=_num_tokens, reverse=True)
    return packed


def _first_fit_decreasing(sequences: Sequence[TrainSequence], max_tokens: int) -> list[Part]:
    """Few micro-batches of <= max_tokens; a sequence above that gets one of its own."""
    parts: list[Part] = []
    room: list[int] = []
    for sequence in _longest_first(sequences):
        length = len(sequence.tokens)
        fits = next((i for i, free in enumerate(room) if free >= length), None)
        if fits is None:
            parts.append([sequence])
            room.append(max_tokens - length)
        else:
            parts[fits].append(sequence)
            room[fits] -= length
    return parts


def _partition(
    sequences: Sequence[TrainSequence], num_parts: int, *, equal_counts: bool = False
) -> list[Part]:
    """Parts of nearly equal token counts: Karmarkar and Karp's largest differencing method.

    Each entry of the heap is a partition of some sequences; the two of the widest spread are
    merged, heaviest part with lightest, until one is left. Starting from one sequence an entry
    gives the best balance; starting from `num_parts` of them, one a part, keeps counts equal.
    """
    assert len(sequences) >= num_parts
    ordered = _longest_first(sequences)
    chunk = num_parts if equal_counts else 1
    heap: list[tuple[int, int, list[Part]]] = []
    for start in range(0, len(ordered), chunk):
        parts: list[Part] = [[sequence] for sequence in ordered[start : start + chunk]]
        parts += [[] for _ in range(num_parts - len(parts))]
        heap.append((-_spread(parts), start, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, left = heapq.heappop(heap)
        _, other, right = heapq.heappop(heap)
        merged = [a + b for a, b in zip(left, reversed(right), strict=True)]
        merged.sort(key=_num_tokens, reverse=True)
        heapq.heappush(heap, (-_spread(merged), min(order, other), merged))
    return heap[0][2]


def _longest_first(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    return sorted(sequences, key=lambda s: (-len(s.tokens), s.sample))


def _spread(parts: Sequence[Part]) -> int:
    """Tokens between the heaviest and the lightest of parts sorted heaviest first."""
    return _num_tokens(parts[0]) - _num_tokens(parts[-1])


def _num_tokens(part: Part) -> int:
    return sum(len(sequence.tokens) for sequence in part)
