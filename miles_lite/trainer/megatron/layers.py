"""Which class makes each layer of the hybrid stack: plain torch on a CPU, megatron's on a GPU."""

# pyright: reportArgumentType=false
# (megatron's specs take builders and functions where their annotations say ModuleSpec or type)

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.trainer.megatron import norms, stand_ins


def stack_spec(model: NemotronH) -> Any:
    """The ModuleSpec of the decoder. The one place where CPU and GPU differ.

    The GPU branch is megatron's unchanged Transformer Engine spec; it has not been run on a GPU.
    """
    spec = _engine_stack_spec() if torch.cuda.is_available() else _local_stack_spec(model)
    spec.submodules.mamba_layer.submodules.mixer.params = {
        "d_conv": model.conv_kernel,
        "chunk_size": model.chunk_size,
    }
    return spec


def _engine_stack_spec() -> Any:
    try:  # megatron-core 0.18
        from megatron.core.models.hybrid.hybrid_layer_specs import (  # pyright: ignore
            hybrid_stack_spec as spec,
        )
    except ImportError:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
    return deepcopy(spec)  # megatron's is a module-level object


def _local_stack_spec(model: NemotronH) -> Any:
    from megatron.core.transformer import ModuleSpec

    try:  # megatron-core 0.18
        from megatron.core.models.hybrid.hybrid_block import (  # pyright: ignore
            HybridStack,
            HybridStackSubmodules,
        )
    except ImportError:
        from megatron.core.ssm.mamba_block import MambaStack as HybridStack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=_mamba(),
            attention_layer=_attention(),
            mlp_layer=_mlp(),
            moe_layer=_moe(model.num_experts),
        ),
    )


# sharded_state_dict_keys_map: checkpoints use the keys of a GPU run, where TE fuses a norm into
# the linear layer after it


def _mamba() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import ModuleSpec

    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norms.TorchNorm,
            mixer=ModuleSpec(module=MambaMixer, submodules=projections),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _attention() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import (
        ModuleSpec,
        TransformerLayer,
        TransformerLayerSubmodules,
    )
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=stand_ins.TorchAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norms.TorchNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
            },
        ),
    )


def _mlp() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import ModuleSpec, TransformerLayerSubmodules
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if hasattr(MLP, "as_mlp_submodule"):  # megatron-core 0.19
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)  # pyright: ignore
    else:
        mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norms.TorchNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
    )


def _moe(num_experts: int) -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import (
        ModuleSpec,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    moe = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norms.TorchNorm, mlp=moe, mlp_bda=get_bias_dropout_add
        ),
    )
