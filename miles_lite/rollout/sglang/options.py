"""Which options of SGLang this project owns, what they are for an engine, and why.

An option (a field of SGLang's ServerArgs) is owned when something else in the configuration, or the
weight sync, decides it; rollout.engine.sglang may then repeat it but not contradict it. Some others
are chosen here and may be overridden. The rest keep SGLang's defaults. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from miles_lite.config import Config, ConfigError
from miles_lite.parallel import EngineDims

# SGLang keeps one token of its context and one of each request back, and refuses prompts that come
# within six of the end; so this much more than prompt and answer together.
CONTEXT_SLACK = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """One engine, before it is known where it runs."""

    folder: Path  # of the model, as model_folder.engine_folder makes it
    dims: EngineDims
    dtype: Literal["fp32", "bf16"]
    device: str  # "cpu" or "cuda"
    max_seq_len: int  # tokens of prompt and answer together
    max_running: int  # requests at once in one DP group
    prefill_tokens: int  # prompt tokens of one prefill batch of one DP group
    seed: int
    stall_s: float = 60.0  # of its scheduler while requests are under way, or of any answer
    num_nodes: int = 1  # hosts of one engine
    threads: int = 1  # of CPU maths in one process
    return_routed_experts: bool = False
    weight_loaders: tuple[str, ...] = ()  # dotted names of functions an update may load with
    python: str = ""  # interpreter that has sglang; "" is this one
    extra: Mapping[str, Any] = field(default_factory=dict)  # rollout.engine.sglang

    @classmethod
    def of(cls, cfg: Config, folder: Path, device: str) -> EngineSpec:
        """What the configuration says; `replace` adds what it does not."""
        engine = cfg.rollout.engine
        return cls(
            folder=folder,
            dims=engine.dims,
            dtype=cfg.model.dtype,
            device=device,
            max_seq_len=cfg.max_seq_len,
            max_running=engine.max_running,
            prefill_tokens=engine.prefill_tokens,
            seed=cfg.seed,
            stall_s=engine.stall_s,
            threads=cfg.cluster.threads_per_rank,
            return_routed_experts=cfg.algo.routing_replay,
            # engines start in other folders; a bare name is looked up in the PATH
            python=os.path.abspath(engine.python) if "/" in engine.python else engine.python,
            extra=engine.sglang,
        )


def options(spec: EngineSpec) -> dict[str, Any]:
    """Every option of an engine except where it runs; ConfigError if spec.extra may not say so."""
    owned = _owned(spec)
    for name, value in spec.extra.items():
        if name in PLACED:
            raise ConfigError(f"rollout.engine.sglang.{name} = {value!r}: {PLACED[name]}")
        if name in owned and value != owned[name].value:
            raise ConfigError(
                f"rollout.engine.sglang.{name} = {value!r}, but {name} = {owned[name].value!r}: "
                f"{owned[name].reason}"
            )
    chosen = {**_chosen(spec), **spec.extra}
    _check_values(chosen)
    return {**chosen, **{name: option.value for name, option in owned.items()}}


def _check_values(chosen: Mapping[str, Any]) -> None:
    """What SGLang lets pass, and fails on after minutes or does not notice."""
    fraction = chosen.get("mem_fraction_static")
    if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction < 1):
        raise ConfigError(
            f"rollout.engine.sglang.mem_fraction_static = {fraction!r}: wanted a number between 0 "
            "and 1, the share of a device's memory for weights and caches"
        )


# ------------------------------------------------------------------ owned


@dataclass(frozen=True, slots=True)
class Owned:
    value: Any
    reason: str  # who decides, and the way out; follows "sglang.x = 1, but x = 2: "


# options of a place, which is found when processes are placed, and why they cannot be asked for
PLACED = {
    **dict.fromkeys(
        ("host", "port", "nccl_port"), "engines find free ports themselves: leave it out"
    ),
    **dict.fromkeys(
        ("nnodes", "node_rank", "dist_init_addr", "base_gpu_id", "gpu_id_step"),
        "it follows from where the engine is placed, on the devices of the trainer: leave it out",
    ),
    **dict.fromkeys(
        ("api_key", "admin_api_key"),
        "every engine gets a secret of its own, which no file holds: leave it out",
    ),
}

_LAYOUT = "weights are sent to where SGLang keeps them at its plain layout: leave it out"
_UNSENT = "the weight sync sends bf16 or fp32 weights of the policy only: leave it out"
_SERVER = "the engine's client speaks plain HTTP with one server: leave it out"

# fixed for every engine: reason -> options
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "SGLang refuses weight updates of replicas; rollout.engine.num_engines makes more engines, "
    "rollout.engine.dp groups of DP attention: set one of those": {"dp_size": 1},
    "this is SGLang's old name of attn_dp_size, which is rollout.engine.dp: set that": {
        "enable_dp_attention": False
    },
    _LAYOUT: {
        "pp_size": 1,
        "attn_cp_size": 1,
        "dcp_size": 1,
        "moe_dp_size": 1,
        "dwdp_size": 1,
        "moe_dense_tp_size": None,
        "enable_shared_experts_attn_tp": False,
        "enable_dense_mlp_attn_tp": False,
        "enable_eplb": False,
        "ep_num_redundant_experts": 0,
        "init_expert_location": "trivial",
        "cpu_offload_gb": 0,
        "offload_group_size": -1,
    },
    _UNSENT: {
        "quantization": None,
        "enable_lora": None,
        "speculative_algorithm": None,
        "speculative_draft_model_path": None,
    },
    _SERVER: {
        "tokenizer_worker_num": 1,
        "grpc_mode": False,
        "smg_grpc_mode": False,
        "use_ray": False,
        "encoder_only": False,
        "disaggregation_mode": "null",
        "ssl_certfile": None,
        "ssl_keyfile": None,
    },
    "weights come from the trainer, so what the engine starts with is never used: leave it out": {
        "load_format": "dummy",
    },
    "the warm-up would generate from weights that have not come yet: leave it out": {
        "skip_server_warmup": True
    },
    "trainer and engine take turns on a device, so the engine must be able to release its "
    "memory: leave it out": {"enable_memory_saver": True},
    "completions carry the version of the weights they were drawn from, which the sync counts: "
    "leave it out": {"weight_version": "-1"},
    "prompts go in and answers come out as token ids: leave it out": {"skip_tokenizer_init": True},
    "it would delete the checkpoint that model.path points to: leave it out": {
        "delete_ckpt_after_loading": False
    },
}


def _owned(spec: EngineSpec) -> dict[str, Owned]:
    dims = spec.dims
    length = "data.max_prompt_tokens + rollout.max_response_tokens"
    derived = {
        "model_path": Owned(str(spec.folder), "a view of model.path: set that"),
        "tp_size": Owned(dims.tp, "it is rollout.engine.tp: set that"),
        "attn_dp_size": Owned(dims.dp, "it is rollout.engine.dp: set that"),
        "ep_size": Owned(dims.ep, "it is rollout.engine.ep: set that"),
        "dtype": Owned(_DTYPES[spec.dtype], "it is model.dtype: set that"),
        "device": Owned(spec.device, "it is cluster.device: set that"),
        "random_seed": Owned(spec.seed, "it is seed: set that"),
        "context_length": Owned(
            spec.max_seq_len + CONTEXT_SLACK, f"it is {length} + {CONTEXT_SLACK}: set those"
        ),
        "max_running_requests": Owned(
            spec.max_running * dims.dp, "it is rollout.engine.max_running x dp: set those"
        ),
        "chunked_prefill_size": Owned(
            spec.prefill_tokens * dims.dp, "it is rollout.engine.prefill_tokens x dp: set those"
        ),
        "enable_return_routed_experts": Owned(
            spec.return_routed_experts, "it follows from whether routes are replayed: leave it out"
        ),
        "custom_weight_loader": Owned(
            list(spec.weight_loaders) or None, "it is what the weight sync loads with: leave it out"
        ),
    }
    for reason, fixed in _FIXED.items():
        derived |= {name: Owned(value, reason) for name, value in fixed.items()}
    return derived


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


# ------------------------------------------------------------------ chosen


def _chosen(spec: EngineSpec) -> dict[str, Any]:
    """Where SGLang's default is not right for a rollout; rollout.engine.sglang may say otherwise.

    Left as they are on a GPU, on purpose: the prefix cache (the samples of a prompt share it, and
    every weight update flushes it), its strategy for Mamba states, CUDA graphs, overlap scheduling,
    the attention and expert kernels.
    """
    chosen: dict[str, Any] = {"log_level_http": "warning"}  # else a line for every request
    if spec.device == "cuda":
        # SGLang leaves a tenth of an H200 to activations and graphs, as if it were alone there; a
        # trainer that released everything still has its CUDA context and NCCL's buffers.
        chosen["mem_fraction_static"] = 0.8
        if spec.dims.dp > 1 and spec.max_running <= 256:
            # SGLang captures up to the requests of all DP groups together; a graph is of one
            chosen["cuda_graph_max_bs_decode"] = spec.max_running
        return chosen
    # sized by requests; else by the host's memory, which is not the engine's
    num_tokens = spec.max_running * (spec.max_seq_len + CONTEXT_SLACK)
    return chosen | ON_CPU | {"max_total_tokens": num_tokens}


ON_CPU: dict[str, Any] = {
    # Mamba states in the prefix cache are written by CUDA kernels only
    "disable_radix_cache": True,
    # torch computes the experts whatever this is, and wants their numbers on its own rank; the
    # CUDA kernels that SGLang else settles on, even on a CPU, have it number them over all
    "moe_runner_backend": "triton",
    "attention_backend": "torch_native",
    "grammar_backend": "none",  # compiles grammars that nobody asks for
    "sleep_on_idle": True,  # else an idle engine takes a core from the trainer
}
