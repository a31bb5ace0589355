"""Slots for what running sequences remember: keys and values of `*`, convolution and state of `M`.

Running sequences always occupy slots 0 .. R-1, in the order of the scheduler's list, so a decode
step works on views of the pools and copies nothing; when a sequence in the middle ends, the last
one moves into its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims


class Cache:
    """Pools by layer: kv[i] [2, slots, kv heads, max_seq_len, head_dim], conv[i] [slots, k-1, C],
    ssm[i] fp32 [slots, groups, n, channels of a group]; all of one rank."""

    def __init__(
        self,
        model: NemotronH,
        dims: EngineDims,
        slots: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        num_slots, max_seq_len = slots
        parts = dims.attn_tp
        kv_heads = max(1, model.num_kv_heads // parts)
        channels = (model.mamba_inner_size + 2 * model.mamba_bc_size) // parts
        kv = (2, num_slots, kv_heads, max_seq_len, model.head_dim)
        conv = (num_slots, model.conv_kernel - 1, channels)
        groups = max(1, model.mamba_num_groups // parts)
        ssm = (num_slots, groups, model.ssm_state_size, model.mamba_inner_size // parts // groups)
        self.kv: dict[int, Tensor] = {}
        self.conv: dict[int, Tensor] = {}
        self.ssm: dict[int, Tensor] = {}
        for layer, kind in enumerate(model.pattern):
            if kind == "*":
                # zeros, since a masked position still multiplies its value by 0
                self.kv[layer] = torch.zeros(kv, dtype=dtype, device=device)
            elif kind == "M":
                self.conv[layer] = torch.zeros(conv, dtype=dtype, device=device)
                self.ssm[layer] = torch.zeros(ssm, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pools in self._pools() for pool in pools.values())

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of slots: (from, to) pairs, no slot in both roles."""
        if not moves:
            return
        sources, targets = ([move[i] for move in moves] for i in (0, 1))
        for pool in self.kv.values():
            pool[:, targets] = pool[:, sources]
        for pools in (self.conv, self.ssm):
            for pool in pools.values():
                pool[targets] = pool[sources]

    def _pools(self) -> tuple[dict[int, Tensor], ...]:
        return self.kv, self.conv, self.ssm
