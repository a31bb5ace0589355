"""What every rank holds, to the unit: read off the weight table and the engine's layout.

Experts that always travel together are merged into one wider expert first, so a model of 50,000
tensors is planned in a second; nothing else is simplified.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.protocols import Hosted
from miles_lite.rollout import layout
from miles_lite.rollout.sglang import layout as sglang
from miles_lite.weights.plan import sync_plan
from miles_lite.weights.table import (
    HfTensor,
    hf_tensors,
    mtp_tensors,
    trainer_layout,
    trainer_layouts,
)

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Coarse:
    """A model whose experts stand for several real ones each; sizes in bytes are the real ones."""

    model: NemotronH
    tensors: Mapping[str, HfTensor]
    experts_merged: int  # real experts in one

    @classmethod
    def of(cls, model: NemotronH, *parts: int) -> Coarse:
        """parts: numbers of ranks that experts are spread over, each a divisor of their number."""
        merged = model.num_experts // math.lcm(*parts) if model.num_experts else 1
        small = model
        if merged > 1:
            small = replace(
                model,
                num_experts=model.num_experts // merged,
                expert_ffn_size=model.expert_ffn_size * merged,
            )
        tensors = hf_tensors(small)
        for name, tensor in tensors.items():
            if ".gate." in name:  # a row for each real expert
                shape = (tensor.shape[0], merged, *tensor.shape[1:])
                tensors[name] = replace(tensor, shape=shape)
        return cls(small, tensors, merged)

    def row_numel(self, tensor: str, dim: int) -> int:
        return self.tensors[tensor].numel // self.tensors[tensor].shape[dim]

    def numel(self, hosted: Hosted) -> int:
        return sum(len(s) * self.row_numel(s.tensor, hosted.dim) for s in hosted.segments)


@functools.cache
def stored_numel(model: NemotronH) -> tuple[int, int]:
    """Elements of a checkpoint: (of the main stack, of the MTP block)."""
    main = sum(tensor.numel for tensor in Coarse.of(model, 1).tensors.values())
    return main, sum(tensor.numel for tensor in mtp_tensors(model).values())


@dataclass(frozen=True, slots=True)
class Buffer:
    """Parameters of one dtype that Megatron keeps, and reduces over `dp` ranks, together."""

    sizes: tuple[tuple[int, int], ...]  # (elements of a parameter, how many such)
    dp: int
    element_bytes: int

    @property
    def numel(self) -> int:
        return sum(size * count for size, count in self.sizes)

    @property
    def padded(self) -> int:
        """Every parameter starts at a multiple of 64 elements, the whole divides over the ranks."""
        used = sum(_up(size, 64) * count for size, count in self.sizes)
        return _up(used, math.lcm(self.dp, 128))


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage; all of its ranks hold as much."""

    index: int
    pattern: str
    buffers: tuple[Buffer, ...]
    num_expert_params: int
    buffer_bytes: int  # of what is no parameter: the routers' bias and counts

    @property
    def num_params(self) -> int:
        return sum(buffer.numel for buffer in self.buffers)

    @property
    def weight_bytes(self) -> int:
        return self.buffer_bytes + sum(b.padded * b.element_bytes for b in self.buffers)

    @property
    def grad_bytes(self) -> int:
        """In fp32, whatever the weights are."""
        return sum(4 * buffer.padded for buffer in self.buffers)

    @property
    def num_optimized(self) -> int:
        """Parameters whose optimizer state one rank holds."""
        return sum(-(-buffer.numel // buffer.dp) for buffer in self.buffers)

    @property
    def num_rounded(self) -> int:
        """Of them, those that have an fp32 master beside the weight."""
        return sum(-(-b.numel // b.dp) for b in self.buffers if b.element_bytes < 4)


@functools.lru_cache(maxsize=256)  # a search asks again and again
def stages(model: NemotronH, dims: ParallelDims, dtype: str) -> tuple[Stage, ...]:
    coarse = Coarse.of(model, dims.ep)
    per_stage = model.num_layers // dims.pp
    found = []
    for index in range(dims.pp):
        sizes: dict[tuple[int, int], dict[int, int]] = {}  # (dp, element bytes) -> size -> count
        num_expert_params = num_bias = 0
        for hosted in trainer_layout(coarse.model, dims, index * dims.tp * dims.dp):
            numel, tensor = coarse.numel(hosted), hosted.segments[0].tensor
            if hosted.param.endswith("expert_bias"):
                num_bias += numel
                continue
            is_expert, count = ".local_experts." in hosted.param, 1
            if is_expert:
                num_expert_params += numel
                numel, count = numel // coarse.experts_merged, coarse.experts_merged
            # without expert parallelism Megatron reduces experts with all other weights
            dp = dims.expert_dp if is_expert and dims.ep > 1 else dims.dp
            width = 4 if coarse.tensors[tensor].fp32 else ELEMENT_BYTES[dtype]
            counts = sizes.setdefault((dp, width), {})
            counts[numel] = counts.get(numel, 0) + count
        buffers = tuple(
            Buffer(tuple(counts.items()), dp, width) for (dp, width), counts in sizes.items()
        )
        pattern = model.pattern[index * per_stage : (index + 1) * per_stage]
        # beside its bias a router counts tokens, in fp32 too
        found.append(Stage(index, pattern, buffers, num_expert_params, 8 * num_bias))
    return tuple(found)


# ------------------------------------------------------------------ engines


def engine_hosted(cfg: Config, model: NemotronH, rank: int) -> list[Hosted]:
    """What an engine rank hosts of `model`."""
    engine = cfg.rollout.engine
    if engine.backend == "sglang":
        cuts = sglang.Cuts.of(engine.sglang)
        found = sglang.params(model, engine.dims, rank, cuts)
    else:
        found = layout.params(model, engine.dims, rank)
    return [hosted for param in found for hosted in param.hosted]


def engine_size(cfg: Config, model: NemotronH) -> tuple[int, int]:
    """(parameters, bytes) of an engine rank."""
    dims = cfg.rollout.engine.dims
    coarse = Coarse.of(model, dims.ep)
    num_params = num_bytes = 0
    for hosted in engine_hosted(cfg, coarse.model, 0):
        numel, fp32 = coarse.numel(hosted), coarse.tensors[hosted.segments[0].tensor].fp32
        num_params += 0 if hosted.param.endswith("correction_bias") else numel
        num_bytes += numel * (4 if fp32 else ELEMENT_BYTES[cfg.model.dtype])
    return num_params, num_bytes


def sync_flows(cfg: Config, model: NemotronH) -> dict[tuple[int, int], int]:
    """(trainer rank, engine rank counted over all engines) -> bytes of one weight sync.

    The plan of a run, for one layer of each kind and stage, counted as often as it occurs.
    """
    dims, engine = cfg.parallel.dims, cfg.rollout.engine
    kinds, per_stage = "".join(sorted(set(model.pattern))), model.num_layers // dims.pp
    coarse = Coarse.of(replace(model, pattern=kinds * dims.pp), dims.ep, engine.ep)
    times = {
        f"backbone.layers.{stage * len(kinds) + i}.": model.pattern[
            stage * per_stage : (stage + 1) * per_stage
        ].count(kind)
        for stage in range(dims.pp)
        for i, kind in enumerate(kinds)
    }
    of_engine = [engine_hosted(cfg, coarse.model, rank) for rank in range(engine.tp)]
    targets = of_engine * engine.num_engines
    routes = sync_plan(
        coarse.tensors,
        trainer_layouts(coarse.model, dims),
        targets,
        home=range(len(targets)),
        element_bytes=ELEMENT_BYTES[cfg.model.dtype],
        bucket_bytes=cfg.sync.bucket_bytes,
    )
    return {
        (route.source, route.target): sum(
            copy.num_bytes * times.get(layer_of(copy.tensor), 1) for copy in route.copies
        )
        for route in routes
    }


def layer_of(tensor: str) -> str:
    """backbone.layers.3. of backbone.layers.3.mixer.D"""
    return ".".join(tensor.split(".", 3)[:3]) + "."


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
