"""Advantages that need the trainer's own log-probs: KL in the reward, whitening over all ranks.

Runs on every rank of the last pipeline stage. Import only after cpu_compat.install().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor

from miles_lite.algo.credit import advantages
from miles_lite.algo.losses import Responses, kl_estimate
from miles_lite.algo.returns import moments, token_advantages, whiten
from miles_lite.config import AlgoConfig
from miles_lite.types import MicroBatch


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a micro-batch before the first update of a step."""

    micro_batch: MicroBatch
    seen: Responses
    old: Tensor | None  # [N] log-probs of the trainer; None: those of the update's own pass
    reference: Tensor | None  # [N] of the frozen reference, where there is one

    @property
    def trained(self) -> list[bool]:
        """[B] whether a sequence is trained on; the rest only keeps the ranks in step."""
        return [weight > 0 for weight in self.micro_batch.token_weights]

    @property
    def trained_lengths(self) -> list[int]:
        return list(compress(self.seen.lengths, self.trained))

    def of_trained(self, values: Tensor) -> Tensor:
        """Those of [N] values that belong to sequences that are trained on."""
        parts = compress(values.split(list(self.seen.lengths)), self.trained)
        return torch.cat([values[:0], *parts])


Facts = Sequence[Sequence[Known]]  # [update][micro-batch] of one DP rank


def token_credit(facts: Facts, algo: AlgoConfig) -> Facts:
    """The same with the advantages [N] that the loss is to use.

    Collective over DP ranks: every one of them must call it, with however few tokens.
    """
    if algo.kl_coef:
        facts = _penalised(facts, algo)
    return _whitened(facts) if algo.whiten else facts


def _penalised(facts: Facts, algo: AlgoConfig) -> Facts:
    """Every reward pays for the KL to the reference: token by token with REINFORCE++, whose
    advantages are returns; for the sequence as a whole where a group is compared."""
    by_sample: dict[int, float] = {}
    if algo.advantage_estimator in ("grpo", "rloo"):
        by_sample = _group_advantages(facts, algo)

    def penalised(known: Known) -> Known:
        kl = _kl(known, algo)
        sample_level = [by_sample.get(s.sample, s.advantage) for s in known.micro_batch.sequences]
        tokens = token_advantages(
            torch.tensor(sample_level, device=kl.device),
            kl,
            known.seen.lengths,
            estimator=algo.advantage_estimator,
            kl_coef=algo.kl_coef,
        )
        return replace(known, seen=replace(known.seen, advantages=tokens))

    return [[penalised(known) for known in update] for update in facts]


def _group_advantages(facts: Facts, algo: AlgoConfig) -> dict[int, float]:
    """By sample, of rewards less KL. The samples of a group may lie on several DP ranks, so each
    rank tells all others what its samples are worth."""
    mine: list[tuple[int, int, float]] = []  # sample, group, reward
    for known in chain.from_iterable(facts):
        parts = _kl(known, algo).double().split(list(known.seen.lengths))
        mine += [
            (s.sample, s.group, s.reward - algo.kl_coef * part.sum().item())
            for s, part in zip(known.micro_batch.sequences, parts, strict=True)
            if s.counts
        ]
    num_ranks = groups.get_data_parallel_world_size()
    everyone: list[list[tuple[int, int, float]]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(everyone, mine, group=groups.get_data_parallel_group())  # pyright: ignore
    rows = sorted(chain.from_iterable(everyone))
    values = advantages(
        [reward for _, _, reward in rows],
        [group for _, group, _ in rows],
        estimator=algo.advantage_estimator,
        normalize_std=algo.normalize_std,
    )
    return {sample: value for (sample, _, _), value in zip(rows, values, strict=True)}


def _kl(known: Known, algo: AlgoConfig) -> Tensor:
    assert known.reference is not None and known.old is not None, "KL in the reward: of both"
    return kl_estimate(known.old, known.reference, algo.kl_loss_type)


def _whitened(facts: Facts) -> Facts:
    """Mean 0 and variance 1 over all tokens of the step that count, of all ranks."""
    device = facts[0][0].seen.advantages.device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for known in chain.from_iterable(facts):
        counts = torch.tensor([s.counts for s in known.micro_batch.sequences], device=device)
        lengths = torch.tensor(known.seen.lengths, device=device)
        total += moments(known.seen.advantages, counts.repeat_interleave(lengths))
    # a rank none of whose tokens counts takes part as well: it adds zeros
    dist.all_reduce(total, group=groups.get_data_parallel_group())  # pyright: ignore

    def whitened(known: Known) -> Known:
        tokens = whiten(known.seen.advantages, total)
        return replace(known, seen=replace(known.seen, advantages=tokens))

    return [[whitened(known) for known in update] for update in facts]
