"""Experts and router of Nemotron-H on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from miles_lite.rollout.embedded.experts import mix_experts


def _patch_experts(module: Any) -> None:
    """SGLang's torch version of the experts cannot take the -1 that marks experts of other ranks
    under expert parallelism, knows no squared ReLU, fails on an empty batch, and forgets
    routed_scaling_factor, which the GPU kernels apply."""
    upstream = module.moe_forward_native

    def moe_forward_native(layer: Any, x: Tensor, topk_output: Any, config: Any) -> Tensor:
        if config.activation != "relu2" or getattr(layer, "w13_weight_bias", None) is not None:
            return upstream(layer, x, topk_output, config)
        weights, ids, _ = topk_output
        out = mix_experts(x, ids, weights, layer.w13_weight, layer.w2_weight, 0)
        if config.routed_scaling_factor is not None and (
            not layer.should_fuse_routed_scaling_factor_in_topk
        ):
            out *= config.routed_scaling_factor
        return out.to(x.dtype)

    module.moe_forward_native = moe_forward_native


def patch_router(module: Any) -> None:
    """The router asks for a product of two half precisions with fp32 output, which torch has on
    CUDA only. A product in fp32 is the same with less rounding."""

    def _forward_core_normal(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = hidden.float() @ self.gate.weight.float().T
        shared = self.shared_experts(hidden) if self.shared_experts is not None else None
        chosen = self.topk(hidden, logits)
        if self.use_latent_moe:
            hidden = self._apply_fc1_latent_proj(hidden)
        return self.experts(hidden, chosen), shared

    module.NemotronHMoE._forward_core_normal = _forward_core_normal


PATCHES = {"sglang.srt.layers.moe.fused_moe_native": _patch_experts}
