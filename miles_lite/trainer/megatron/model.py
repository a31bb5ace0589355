"""A NemotronH as a megatron-core module: its config, the module, its weights by name.

Call `cpu_compat.install()` (or `setup.init`, which does) before any function of this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron.layers import stack_spec
from miles_lite.trainer.megatron.limits import (
    refuse_lost_expert_gradients,
    refuse_what_megatron_changes,
)
from miles_lite.trainer.megatron.recompute import recompute_layers

# names of a mixer's parameters, and of a router's buffer, that stay fp32 in a bf16 model: rounded,
# they change which experts are chosen and how fast the state decays
_FP32 = ("mixer.A_log", "mixer.D", "mixer.dt_bias", "router.expert_bias")


def transformer_config(
    model: NemotronH,
    dims: ParallelDims,
    dtype: torch.dtype,
    overrides: Mapping[str, Any],
    routing_replay: bool = False,
) -> Any:
    """Megatron's TransformerConfig of `model` laid out as `dims`.

    `overrides` are further fields of it; one that does not exist, or that contradicts the model or
    the layout, is a ValueError.
    """
    from megatron.core import __version__
    from megatron.core.transformer import TransformerConfig

    if model.num_experts:
        refuse_lost_expert_gradients(dims, __version__)
    refuse_what_megatron_changes(model, dims)
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    derived = _of_model(model) | _of_layout(dims, dtype)
    if routing_replay:
        if "moe_enable_routing_replay" not in fields:
            raise ValueError(
                f"algo.routing_replay = true: megatron-core {__version__} has no router replay, "
                "0.16.1 and newer have; take one of these, or leave it false"
            )
        # a fused router would not ask which experts to take
        derived |= dict(moe_enable_routing_replay=True, moe_router_fusion=False)
    chosen = _defaults(torch.cuda.is_available())
    for name, value in overrides.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"megatron.{name} is no field of TransformerConfig{hint}")
        if isinstance(fields[name].default, Enum) and isinstance(value, str):
            value = _enum_member(name, type(fields[name].default), value)
        if name in derived and derived[name] != value:
            raise ValueError(
                f"megatron.{name} = {value!r} contradicts {derived[name]!r}, which follows from "
                "the model, the parallel layout or algo.routing_replay: leave it out"
            )
        chosen[name] = value
    return TransformerConfig(**(chosen | derived))


def build_model(model: NemotronH, config: Any) -> nn.Module:
    """This rank's pipeline stage, randomly initialised.

    Its post-process stage returns final hidden states, not logits: see `forward`. A bf16 model is
    created in bf16; megatron's Float16Module, which would round the `_FP32` ones, is not used.
    """
    from megatron.core import parallel_state

    try:  # megatron-core 0.18
        from megatron.core.models.hybrid.hybrid_model import (  # pyright: ignore
            HybridModel as Model,
        )
    except ImportError:
        from megatron.core.models.mamba import MambaModel as Model
    arguments = inspect.signature(Model.__init__).parameters
    pattern: dict[str, Any] = {"hybrid_override_pattern": model.pattern}
    if "hybrid_layer_pattern" in arguments:  # megatron-core 0.17: stages are spelt out
        per_stage = model.num_layers // config.pipeline_model_parallel_size
        stages = (model.pattern[i : i + per_stage] for i in range(0, model.num_layers, per_stage))
        pattern = {"hybrid_layer_pattern": "|".join(stages)}
    module = Model(
        config,
        stack_spec(model),
        vocab_size=model.vocab_size,
        max_sequence_length=1,  # of position embeddings, which there are none
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        **pattern,
    )
    _keep_fp32(module, config.params_dtype)
    recompute_layers(module.decoder)
    if module.post_process:
        module.output_layer.forward = _pass_hidden  # pyright: ignore[reportAttributeAccessIssue]
    return module


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Live parameters and persistent buffers under the names of the weight table.

    Those are the local-spec names of megatron-core 0.16, with this rank's own layer and expert
    numbers, whatever version and spec made the module.
    """
    state = unwrap(module).state_dict(keep_vars=True)
    return {
        canonical_name(name): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }


def canonical_name(name: str) -> str:
    """The weight table's name of a parameter that megatron calls `name`."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # megatron-core 0.19 holds the convolution's parameters itself
        (r"\.mixer\.conv1d_(weight|bias)$", r".mixer.conv1d.\1"),
        # Transformer Engine fuses a norm into the linear layer after it ...
        (r"\.mixer\.in_proj\.layer_norm_weight$", ".norm.weight"),
        (r"\.self_attention\.linear_qkv\.layer_norm_weight$", ".input_layernorm.weight"),
        (r"\.mlp\.linear_fc1\.layer_norm_weight$", ".pre_mlp_layernorm.weight"),
        # ... and holds the experts of a rank in one module
        (
            r"\.experts\.(linear_fc[12])\.weight(\d+)$",
            r".experts.local_experts.\2.\1.weight",
        ),
    )
)


def unwrap(module: nn.Module) -> Any:
    """The model inside DistributedDataParallel and the like."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


# ---- the config, by where a value comes from


def _of_model(model: NemotronH) -> dict[str, Any]:
    from megatron.core.activations import squared_relu

    fields: dict[str, Any] = dict(
        is_hybrid_model=True,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.dense_ffn_size or model.expert_ffn_size,
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_state_dim=model.ssm_state_size,
        mamba_num_groups=model.mamba_num_groups,
        use_mamba_mem_eff_path=True,  # the only one that knows packed sequences
    )
    if model.num_experts:
        fields |= dict(
            num_moe_experts=model.num_experts,
            moe_router_topk=model.top_k,
            moe_ffn_hidden_size=model.expert_ffn_size,
            moe_shared_expert_intermediate_size=model.shared_ffn_size,
            moe_latent_size=model.latent_size or None,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            # the bias is a fact of the checkpoint; the default rate would move it every update
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=model.routed_scaling_factor,
        )
    return fields


def _of_layout(dims: ParallelDims, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=dims.tp,
        sequence_parallel=dims.tp > 1,  # megatron's MoE needs it to train with TP
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.expert_tp,
        context_parallel_size=1,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=False,
    )


def _defaults(on_gpu: bool) -> dict[str, Any]:
    """What a user may override: how to compute, not what."""
    return dict(
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,  # there are no biases
        bias_dropout_fusion=on_gpu,
        use_fused_weighted_squared_relu=on_gpu,
        moe_grouped_gemm=on_gpu,
        moe_permute_fusion=on_gpu,  # adds a token's experts up in fp32
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
    )


def _enum_member(field: str, kind: type[Enum], name: str) -> Enum:
    if name not in kind.__members__:
        raise ValueError(f"megatron.{field} = {name!r} is not one of {', '.join(kind.__members__)}")
    return kind[name]


# ---- the module


def _keep_fp32(module: nn.Module, dtype: torch.dtype) -> None:
    """Make `_FP32` weights fp32 and see that all others have the model's dtype."""
    for name, tensor in named_weights(module).items():
        if name.endswith(_FP32):
            tensor.data = tensor.data.float()
        else:
            assert tensor.dtype is dtype, f"{name} is {tensor.dtype} in a model of {dtype}"


def _pass_hidden(
    hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, None]:
    """In place of the output layer's forward: logits are made chunk by chunk in `logprob`."""
    return hidden, None
