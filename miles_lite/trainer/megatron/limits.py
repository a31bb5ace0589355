"""What megatron-core cannot do, or would silently do differently. Imports neither it nor torch."""

from __future__ import annotations

from miles_lite.config import ConfigError
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims

# what megatron's Mamba mixer hard-codes as epsilon of its gated norm
_GATED_NORM_EPS = 1e-5


def refuse_what_megatron_changes(model: NemotronH, dims: ParallelDims) -> None:
    """Refuse what megatron would compute differently from the checkpoint's own code, or drop."""
    if model.norm_eps != _GATED_NORM_EPS:
        raise ConfigError(
            f"norm_eps = {model.norm_eps}: megatron's Mamba mixer knows {_GATED_NORM_EPS} only"
        )
    if model.num_experts and (not model.norm_topk_prob or model.top_k == 1):
        raise ConfigError(
            f"norm_topk_prob = {model.norm_topk_prob} with top_k = {model.top_k}: megatron always "
            "normalises the chosen experts' weights, and only if there are several"
        )
    if model.num_layers % dims.pp:
        raise ConfigError(
            f"parallel.pp = {dims.pp} does not divide the {model.num_layers} layers of the pattern "
            "(layers of the pattern that are left over would be dropped); "
            f"it may be {divisors(model.num_layers)}"
        )


def refuse_lost_expert_gradients(dims: ParallelDims, megatron_version: str) -> None:
    """Refuse a layout whose gradients this megatron-core silently gets wrong.

    Before 0.19, experts that are neither cut by tensor parallelism nor spread over expert
    parallelism are taken for ordinary replicated weights, and the gradients that tensor-parallel
    ranks computed from their own tokens are never summed.
    """
    release = tuple(int(part) for part in megatron_version.split(".")[:2])
    if dims.tp > 1 and dims.ep == 1 and dims.expert_tp != dims.tp and release < (0, 19):
        raise ConfigError(
            f"parallel.tp = {dims.tp} with ep = 1 and expert_tp = {dims.expert_tp}: megatron-core "
            f"{megatron_version} would lose expert gradients. Set parallel.expert_tp = {dims.tp}, "
            "or ep > 1, or use megatron-core 0.19 or newer"
        )


def divisors(number: int) -> str:
    """The first few divisors, for a message."""
    found = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
