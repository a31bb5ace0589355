"""The options of SGLang: which ones this project owns, what they are for an engine, and whether
those that a user adds may stand beside them.

Everything else keeps SGLang's default, or what rollout.engine.sglang says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from miles_lite.config import ConfigError
from miles_lite.parallel import EngineDims


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """One engine, before it is known where it runs."""

    folder: Path  # of the model, as model_folder.engine_folder makes it
    dims: EngineDims
    num_nodes: int = 1  # hosts of one engine
    dtype: Literal["fp32", "bf16"]
    device: Literal["cpu", "cuda"]
    context_len: int  # tokens of prompt and answer together
    max_running: int  # requests at once in one DP group
    prefill_tokens: int  # prompt tokens of one prefill batch of one DP group
    seed: int
    return_routed_experts: bool = False
    weight_loader: str = ""  # dotted name of a function that load_format may name
    python: str = ""  # interpreter that has sglang; "" is this one
    extra: Mapping[str, Any] = field(default_factory=dict)  # rollout.engine.sglang


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def options(spec: EngineSpec) -> dict[str, Any]:
    """Every option of the engine but its place; ConfigError where `spec.extra` contradicts one."""
    owned = _owned(spec)
    chosen = _for_cpu(spec) if spec.device == "cpu" else {}
    for name, value in spec.extra.items():
        if name in owned and owned[name].value != value:
            raise ConfigError(
                f"rollout.engine.sglang.{name} = {value!r} contradicts {owned[name].reason}"
            )
    return {name: o.value for name, o in owned.items()} | chosen | dict(spec.extra)


@dataclass(frozen=True, slots=True)
class _Owned:
    value: Any
    reason: str  # what it comes from, and the way out; continues "... contradicts"


def _owned(spec: EngineSpec) -> dict[str, _Owned]:
    dims, rollout = spec.dims, "rollout.engine"
    total_running = spec.max_running * dims.dp
    return {
        "model_path": _Owned(str(spec.folder), "model.path: set that"),
        "tp_size": _Owned(dims.tp, f"{rollout}.tp = {dims.tp}: set that"),
        "ep_size": _Owned(dims.ep, f"{rollout}.ep = {dims.ep}: set that"),
        "attn_dp_size": _Owned(dims.dp, f"{rollout}.dp = {dims.dp}: set that"),
        "nnodes": _Owned(spec.num_nodes, "where the engine was placed: leave it out"),
        "dtype": _Owned(_DTYPES[spec.dtype], f"model.dtype = {spec.dtype}: set that"),
        "device": _Owned(spec.device, f"cluster.device = {spec.device}: set that"),
        "context_length": _Owned(spec.context_len, "lengths"),
        "max_running_requests": _Owned(total_running, f"{rollout}.max_running"),
        "chunked_prefill_size": _Owned(spec.prefill_tokens * dims.dp, f"{rollout}.prefill_tokens"),
        "random_seed": _Owned(spec.seed, "seed"),
        "load_format": _Owned("dummy", "sync"),
        "skip_server_warmup": _Owned(True, "x"),
        "enable_memory_saver": _Owned(True, "x"),
        "enable_return_routed_experts": _Owned(spec.return_routed_experts, "x"),
    }


def _for_cpu(spec: EngineSpec) -> dict[str, Any]:
    return {
        "attention_backend": "torch_native",
        "disable_radix_cache": True,
        "moe_runner_backend": "triton",
        "sleep_on_idle": True,
        "max_total_tokens": spec.max_running * spec.context_len,
        "grammar_backend": "none",
    }
