"""Combinations that cannot work, refused before anything starts: names, values, and the way out.

What one section of the configuration can check alone is checked there; here are the rules that
need the model's sizes or two sections at once. Imports no torch.
"""

from __future__ import annotations

from importlib import metadata

from miles_lite.config import Config, ConfigError
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims

# what megatron's Mamba mixer hard-codes as epsilon of its gated norm
_GATED_NORM_EPS = 1e-5


def check(cfg: Config, model: NemotronH) -> None:
    """Raise ConfigError on the first rule that `cfg` breaks for `model`."""
    _check_trainer_layout(cfg, model)
    _check_engine_layout(cfg, model)
    _check_batch(cfg)
    _check_lengths(cfg)


def _check_trainer_layout(cfg: Config, model: NemotronH) -> None:
    dims = cfg.parallel.dims
    _check_tensor_parallel("parallel.tp", dims.tp, model)
    refuse_what_megatron_changes(model, dims)
    if "E" not in model.pattern:
        if dims.ep != 1:
            raise ConfigError(f"parallel.ep = {dims.ep} but the model has no experts: set it to 1")
        return
    _divides("parallel.ep", dims.ep, "experts (n_routed_experts)", model.num_experts)
    _divides("parallel.expert_tp", dims.expert_tp, "expert width", model.expert_ffn_size)
    _check_expert_grid(dims)
    refuse_lost_expert_gradients(dims, metadata.version("megatron-core"))


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
    # megatron would drop the last layers
    _divides("parallel.pp", dims.pp, "layers of the pattern", model.num_layers)


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


def _check_expert_grid(dims: ParallelDims) -> None:
    ranks = dims.tp * dims.dp
    if ranks % (dims.ep * dims.expert_tp):
        raise ConfigError(
            f"parallel.ep x expert_tp = {dims.ep} x {dims.expert_tp} does not divide the "
            f"{ranks} ranks of a pipeline stage (tp x dp = {dims.tp} x {dims.dp}); "
            f"ep x expert_tp may be {_divisors(ranks)}"
        )


def _check_tensor_parallel(key: str, tp: int, model: NemotronH) -> None:
    """Whole heads and whole Mamba groups on every rank. Key-value heads may be shared by ranks."""
    if "M" in model.pattern:
        _divides(key, tp, "Mamba groups (n_groups)", model.mamba_num_groups)
        _divides(key, tp, "Mamba heads", model.mamba_num_heads)
    if "*" in model.pattern:
        _divides(key, tp, "attention heads", model.num_heads)
        kv = model.num_kv_heads
        if kv % tp and tp % kv:
            raise ConfigError(
                f"{key} = {tp} and {kv} key-value heads: one must divide the other; "
                f"{key} may be {_divisors(model.num_heads)}"
            )
    if "E" in model.pattern:
        _divides(key, tp, "shared expert width", model.shared_ffn_size)
    if "-" in model.pattern:
        _divides(key, tp, "MLP width", model.dense_ffn_size)
    _divides(key, tp, "vocabulary", model.vocab_size)


def _check_engine_layout(cfg: Config, model: NemotronH) -> None:
    engine, dims = cfg.rollout.engine, cfg.rollout.engine.dims
    devices = cfg.parallel.dims.world_size
    if engine.num_engines * engine.tp > devices:
        raise ConfigError(
            f"rollout.engine.num_engines x tp = {engine.num_engines} x {engine.tp} processes, but "
            f"the trainer has {devices} devices (parallel.tp x pp x dp) and engines share them: "
            "make engines fewer or smaller, or the trainer larger"
        )
    _check_tensor_parallel("rollout.engine.tp / dp", dims.attn_tp, model)
    if "E" in model.pattern:
        _divides("rollout.engine.ep", dims.ep, "experts (n_routed_experts)", model.num_experts)
        _divides("rollout.engine.tp / ep", dims.expert_tp, "expert width", model.expert_ffn_size)


def _check_batch(cfg: Config) -> None:
    samples, batch = cfg.rollout.num_samples, cfg.train.global_batch
    if samples % batch:
        raise ConfigError(
            f"rollout.num_prompts x samples_per_prompt = {cfg.rollout.num_prompts} x "
            f"{cfg.rollout.samples_per_prompt} = {samples} samples a step do not split into "
            f"updates of train.global_batch = {batch}; it may be {_divisors(samples)}"
        )
    if batch % cfg.parallel.dp:
        raise ConfigError(
            f"train.global_batch = {batch} is not a multiple of parallel.dp = {cfg.parallel.dp}: "
            "ranks could not all run the same number of micro-batches"
        )
    if cfg.rollout.samples_per_prompt == 1:
        raise ConfigError(
            "rollout.samples_per_prompt = 1: a group of one has no advantage, GRPO would learn "
            "nothing; use 2 or more"
        )


def _check_lengths(cfg: Config) -> None:
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    if longest > cfg.train.max_sequence_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} may exceed "
            f"train.max_sequence_tokens = {cfg.train.max_sequence_tokens}, the longest sequence "
            "that training accepts: raise it or shorten answers"
        )


def _divides(key: str, value: int, what: str, amount: int) -> None:
    if amount % value:
        raise ConfigError(
            f"{key} = {value} does not divide the {amount} {what}; it may be {_divisors(amount)}"
        )


def _divisors(number: int) -> str:
    """The first few divisors, for a message."""
    found = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
