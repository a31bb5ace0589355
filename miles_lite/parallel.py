"""Rank <-> coordinates, as pure arithmetic. The same numbers Megatron-core and the engines use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Trainer layout. Ranks count TP fastest, then DP, then PP (Megatron's "tp-cp-ep-dp-pp").

    Experts live on their own grid over the same ranks: expert-TP fastest, then EP, then expert-DP,
    then PP.
    """

    tp: int
    pp: int
    dp: int
    ep: int
    expert_tp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        return self.tp * self.dp // (self.expert_tp * self.ep)

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def dp_rank(self, rank: int) -> int:
        return rank // self.tp % self.dp

    def pp_rank(self, rank: int) -> int:
        return rank // (self.tp * self.dp)

    def expert_tp_rank(self, rank: int) -> int:
        return rank % self.expert_tp

    def ep_rank(self, rank: int) -> int:
        return rank // self.expert_tp % self.ep


@dataclass(frozen=True, slots=True)
class EngineDims:
    """Layout of one engine, as SGLang counts it.

    `tp` processes in all. With `dp` > 1 (DP attention) they form `dp` groups of `attn_tp` ranks:
    attention and Mamba layers are cut over a group, requests are spread over groups, and experts
    are spread over all `tp` processes: `ep` sets of experts, each cut over `expert_tp` ranks.
    """

    tp: int
    dp: int
    ep: int

    @property
    def attn_tp(self) -> int:
        return self.tp // self.dp

    @property
    def expert_tp(self) -> int:
        return self.tp // self.ep

    def dp_rank(self, rank: int) -> int:
        return rank // self.attn_tp

    def attn_tp_rank(self, rank: int) -> int:
        return rank % self.attn_tp

    def ep_rank(self, rank: int) -> int:
        return rank // self.expert_tp

    def expert_tp_rank(self, rank: int) -> int:
        return rank % self.expert_tp
