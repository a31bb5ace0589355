"""The plan's counts against the modules themselves: megatron-core builds the ranks of a layout on
the meta device, in a fake process group of the full world size. Nothing is allocated, nothing runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles_lite.config import Config, ConfigError
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner.shards import stages
from miles_lite.weights.table import hf_tensors, iter_segments, trainer_layout


@dataclass(frozen=True, slots=True)
class Verified:
    """One rank, as its live modules and Megatron's buffers are."""

    rank: int
    num_params: int
    weight_bytes: int
    grad_bytes: int


def ranks_of_every_role(cfg: Config) -> list[int]:
    """Of each stage the first and the last rank: other coordinates of all groups."""
    dims = cfg.parallel.dims
    per_stage = dims.tp * dims.dp
    edges = [(s * per_stage, (s + 1) * per_stage - 1) for s in range(dims.pp)]
    return sorted({rank for edge in edges for rank in edge})


def verify(cfg: Config, model: NemotronH, ranks: Sequence[int]) -> list[Verified]:
    """Raises ConfigError naming rank and parameter where plan and modules differ.

    To be called in a process that has not imported megatron yet, or only with cpu_compat.
    """
    import torch

    from miles_lite.trainer.megatron import cpu_compat

    if torch.cuda.is_available():
        raise ConfigError("verify builds modules of the CPU: call it with CUDA_VISIBLE_DEVICES=''")
    cpu_compat.install(device="meta")
    try:
        return [_verify(cfg, model, rank) for rank in ranks]
    finally:
        cpu_compat.install(device="cpu")


def _verify(cfg: Config, model: NemotronH, rank: int) -> Verified:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from miles_lite.trainer.megatron import setup
    from miles_lite.trainer.megatron.model import build_model, named_weights, transformer_config
    from miles_lite.trainer.megatron.worker import DTYPES

    dims, dtype = cfg.parallel.dims, DTYPES[cfg.model.dtype]
    dist.init_process_group("fake", rank=rank, world_size=dims.world_size, store=FakeStore())
    try:
        setup.init_groups(dims, cfg.seed, cfg.train.timeout_s)
        from miles_lite.trainer.megatron import memory, optimizer

        with torch.device("meta"):
            config = transformer_config(model, dims, dtype, cfg.train.megatron)
            module = build_model(model, config)
            _compare_shapes(model, cfg, rank, named_weights(module))
            ddp = optimizer.wrap_ddp(module)
        held = memory.DeviceMemory(ddp, torch.device("meta"), dict).held_bytes()
        found = Verified(
            rank,
            sum(parameter.numel() for parameter in ddp.module.parameters()),
            held["weights"],
            held["grads"],
        )
    finally:
        setup.destroy()
    stage = stages(model, dims, cfg.model.dtype)[dims.pp_rank(rank)]
    planned = Verified(rank, stage.num_params, stage.weight_bytes, stage.grad_bytes)
    if found != planned:
        raise ConfigError(f"the plan says {planned}, megatron's modules say {found}")
    return found


def _compare_shapes(model: NemotronH, cfg: Config, rank: int, live: dict[str, Any]) -> None:
    """Name by name against the weight table."""
    tensors, left = hf_tensors(model), dict(live)
    for hosted in trainer_layout(model, cfg.parallel.dims, rank):
        rows = sum(count for *_, count in iter_segments(hosted))
        shape = list(tensors[hosted.segments[0].tensor].shape)
        shape[hosted.dim] = rows
        tensor = left.pop(hosted.param, None)
        if tensor is None or list(tensor.shape) != shape:
            there = "is not there" if tensor is None else f"has shape {list(tensor.shape)}"
            raise ConfigError(f"rank {rank}: {hosted.param} {there}, the plan says {shape}")
    if left:
        raise ConfigError(f"rank {rank}: the plan knows nothing of {sorted(left)[:5]}")
