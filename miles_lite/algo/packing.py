"""Sequences become the forward passes of each update: who computes what, with which weight.

Sequences are split into updates in rollout order. Within an update they are balanced over the
data-parallel ranks by what they cost, then packed on each rank into micro-batches. Every rank runs
the same number of micro-batches, none of them empty: pipeline and expert-parallel collectives run
once a micro-batch, and a rank with one more would wait for ever. All of it is deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from miles_lite.config import Config
from miles_lite.protocols import Metrics
from miles_lite.types import Batch, MicroBatch, TrainSequence, Update

Aggregation = Literal["sample", "token", "constant"]
Cost = Callable[[int], int]  # operations that a sequence of so many tokens takes
Part = list[TrainSequence]  # of a rank, or of a micro-batch


@dataclass(frozen=True, slots=True)
class PackSettings:
    dp: int
    global_batch: int  # samples of an update
    max_tokens: int  # of a micro-batch, never exceeded; TP may pad by less than its size
    aggregation: Aggregation
    aggregation_constant: float  # what "constant" divides a sample's sum by
    train_zero_advantage: bool
    cost: Cost

    @classmethod
    def of(cls, cfg: Config, cost: Cost) -> PackSettings:
        return cls(
            dp=cfg.parallel.dp,
            global_batch=cfg.train.global_batch,
            max_tokens=cfg.train.max_tokens_per_micro_batch,
            aggregation=cfg.algo.aggregation,
            aggregation_constant=cfg.algo.aggregation_constant or cfg.rollout.max_response_tokens,
            train_zero_advantage=cfg.algo.train_zero_advantage,
            cost=cost,
        )


def pack(sequences: Sequence[TrainSequence], settings: PackSettings) -> Batch:
    """All updates of a step. Raises ValueError, before any training, for what cannot be packed.

    What has no gradient is spared its passes: sequences that do not count and, unless they are to
    be trained, those of advantage 0, which still weigh in the denominators. The shortest of the
    spared come along at weight 0 where the rest is no multiple of the ranks: all must have as many.
    """
    _check(sequences, settings)
    updates = []
    for start in range(0, len(sequences), settings.global_batch):
        chosen = sequences[start : start + settings.global_batch]
        trained = [s for s in chosen if _has_gradient(s, settings)]
        spared = [s for s in chosen if not _has_gradient(s, settings)]
        weights = _token_weights(chosen, trained, settings)
        ranks = _micro_batches(trained + _company(spared, len(trained), settings.dp), settings)
        updates.append(
            Update(
                tuple(
                    tuple(
                        MicroBatch(tuple(part), tuple(weights[s.sample] for s in part))
                        for part in rank
                    )
                    for rank in ranks
                )
            )
        )
    return Batch(tuple(updates))


def packing_metrics(batch: Batch, settings: PackSettings) -> Metrics:
    """`perf/imbalance`: operations of the busiest rank over the mean rank, summed over updates.

    1 is perfect; 1.2 means that the average rank idles a sixth of the training time. `perf/fill` is
    the share of the token budget of all micro-batches that is used.
    """
    loads = [
        [sum(_cost(mb.sequences, settings.cost) for mb in rank) for rank in update.micro_batches]
        for update in batch.updates
    ]
    mean = sum(sum(ranks) / len(ranks) for ranks in loads)
    num_passes = sum(u.num_micro_batches for u in batch.updates)
    num_tokens = sum(len(s.tokens) for s in batch.sequences)
    num_samples = len(batch.updates) * settings.global_batch
    return {
        "perf/imbalance": sum(max(ranks) for ranks in loads) / mean,
        "perf/num_micro_batches": float(num_passes),
        "perf/fill": num_tokens / (num_passes * settings.dp * settings.max_tokens),
        "perf/spared_ratio": 1 - len(batch.sequences) / num_samples,
    }


def _check(sequences: Sequence[TrainSequence], settings: PackSettings) -> None:
    dp, global_batch = settings.dp, settings.global_batch
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
    if len(longest.tokens) > settings.max_tokens:
        raise ValueError(
            f"sample {longest.sample} has {len(longest.tokens)} tokens ({longest.prompt_len} "
            f"prompt + {longest.response_len} response), over the {settings.max_tokens} of a "
            "forward pass: raise train.max_tokens_per_micro_batch if the memory allows, or lower "
            "the prompt or response length"
        )


def _has_gradient(sequence: TrainSequence, settings: PackSettings) -> bool:
    return sequence.counts and (settings.train_zero_advantage or sequence.advantage != 0)


def _company(spared: Sequence[TrainSequence], num_trained: int, dp: int) -> list[TrainSequence]:
    """The shortest of the spared, as many as make the trained a multiple of the ranks."""
    missing = -num_trained % dp if num_trained else dp
    return _longest_first(spared)[len(spared) - missing :]


def _token_weights(
    update: Sequence[TrainSequence], trained: Sequence[TrainSequence], settings: PackSettings
) -> dict[int, float]:
    """Loss weight of each response token, by sample; 0 for what is computed but not trained.

    "sample": mean over samples of the mean over their tokens; "token": mean over all tokens;
    "constant": mean over samples of the sum over their tokens / constant (Dr.GRPO: Liu et al.
    2025). A sample without response tokens counts as one in the denominator, and weighs nothing.
    """
    tokens = {s.sample: max(1, s.response_len) for s in update if s.counts}
    if settings.aggregation == "sample":
        weights = {sample: 1 / (num_tokens * len(tokens)) for sample, num_tokens in tokens.items()}
    elif settings.aggregation == "token":
        weights = dict.fromkeys(tokens, 1 / max(1, sum(tokens.values())))
    else:
        assert settings.aggregation == "constant", f"no aggregation {settings.aggregation!r}"
        assert settings.aggregation_constant > 0, "a sum over tokens wants a constant to divide by"
        share = 1 / (settings.aggregation_constant * max(1, len(tokens)))
        weights = dict.fromkeys(tokens, share)
    by_sample = dict.fromkeys((s.sample for s in update), 0.0)
    return by_sample | {s.sample: weights[s.sample] for s in trained if s.response_len}


# ------------------------------------------------------------------ who computes what


def _micro_batches(update: Sequence[TrainSequence], settings: PackSettings) -> list[list[Part]]:
    """[dp][i] of micro-batches, the same number on each rank.

    The freest balance comes first. It may leave a rank with fewer sequences, all long, than another
    has micro-batches; then each rank gets the same number of sequences, which always works out.
    """
    dp, cost, max_tokens = settings.dp, settings.cost, settings.max_tokens
    ranks = _partition(update, dp, cost)
    packed = [_first_fit_decreasing(rank, max_tokens) for rank in ranks]
    if min(map(len, ranks)) < max(map(len, packed)):
        ranks = _partition(update, dp, cost, equal_counts=True)
        packed = [_first_fit_decreasing(rank, max_tokens) for rank in ranks]
    num_micro_batches = max(map(len, packed))
    for micro_batches in packed:
        while len(micro_batches) < num_micro_batches:
            divisible = [part for part in micro_batches if len(part) > 1]
            largest = max(divisible, key=_num_tokens)
            micro_batches.remove(largest)
            micro_batches += _partition(largest, 2, cost)
        # Experts are exchanged across DP ranks: let those that meet have about the same size.
        micro_batches.sort(key=_num_tokens, reverse=True)
    return packed


def _first_fit_decreasing(sequences: Sequence[TrainSequence], max_tokens: int) -> list[Part]:
    """Few micro-batches of <= max_tokens."""
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
    sequences: Sequence[TrainSequence], num_parts: int, cost: Cost, *, equal_counts: bool = False
) -> list[Part]:
    """Parts of nearly equal cost: Karmarkar and Karp's largest differencing method.

    Each entry of the heap is a partition of some sequences, heaviest part first, empty parts left
    out; the two of the widest spread are merged, heaviest part with lightest, until one is left.
    Starting from one sequence an entry gives the best balance; starting from `num_parts` of them,
    one a part, keeps counts equal.
    """
    assert len(sequences) >= num_parts
    ordered = _longest_first(sequences)
    chunk = num_parts if equal_counts else 1
    heap: list[tuple[int, int, list[tuple[int, Part]]]] = []  # -spread, order, (load, part)s

    def add(order: int, parts: list[tuple[int, Part]]) -> None:
        lightest = parts[-1][0] if len(parts) == num_parts else 0
        heapq.heappush(heap, (lightest - parts[0][0], order, parts))

    for start in range(0, len(ordered), chunk):
        add(start, [(cost(len(s.tokens)), [s]) for s in ordered[start : start + chunk]])
    while len(heap) > 1:
        _, order, left = heapq.heappop(heap)
        _, other, right = heapq.heappop(heap)
        right.reverse()
        shared = max(0, len(left) + len(right) - num_parts)  # parts that both have: they add up
        alone = len(left) - shared
        pairs = zip(left[alone:], right[:shared], strict=True)
        both = [(a_load + b_load, a + b) for (a_load, a), (b_load, b) in pairs]
        merged = left[:alone] + both + right[shared:]
        merged.sort(key=lambda entry: -entry[0])
        add(min(order, other), merged)
    parts = [part for _, part in heap[0][2]]
    return parts + [[] for _ in range(num_parts - len(parts))]


def _longest_first(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    return sorted(sequences, key=lambda s: (-len(s.tokens), s.sample))


def _num_tokens(part: Part) -> int:
    return sum(len(sequence.tokens) for sequence in part)


def _cost(sequences: Sequence[TrainSequence], cost: Cost) -> int:
    return sum(cost(len(sequence.tokens)) for sequence in sequences)
