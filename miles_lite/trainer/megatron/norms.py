"""Plain-torch stand-ins for the norms that megatron-core takes from others: see stand_ins.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * weight over the last dim of [T, G, D], weight [G, D]; in fp32, rounded once.

    Its backward pass takes half the time of what autograd makes of the formula.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        unit = wide * inverse
        ctx.save_for_backward(unit, inverse, weight)
        ctx.dtype = x.dtype
        return (unit * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        unit, inverse, weight = ctx.saved_tensors
        grad = grad.float()
        along = grad * unit
        grad_weight = along.sum(0).to(weight.dtype)
        shift = (along * weight).mean(-1, keepdim=True)  # what would only scale x has no effect
        grad_x = torch.mul(grad, weight).addcmul_(unit, shift, value=-1).mul_(inverse)
        return grad_x.to(ctx.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """x [..., G D] over the root of its mean square within each group of D, times weight [G D]."""
    grouped = x.reshape(-1, num_groups, x.shape[-1] // num_groups)
    return _RmsNorm.apply(grouped, weight.view(num_groups, -1), eps).view(x.shape)  # pyright: ignore


class TorchNorm(nn.RMSNorm):
    """TENorm. Under sequence parallelism its gradient is summed over TP, which the flag asks for.

    (Megatron's WrappedTorchNorm refuses sequence parallelism.)
    """

    def __init__(self, config: Any, hidden_size: int, eps: float | None = None, **_: Any) -> None:
        assert config.normalization == "RMSNorm", config.normalization
        eps = config.layernorm_epsilon if eps is None else eps
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class RMSNormGated(nn.Module):
    """mamba_ssm.ops.triton.layernorm_gated.RMSNorm: RMS norm within groups, in fp32.

    Megatron applies the gate in the scan, so it calls this one without.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, x.shape[-1] // self.group_size)
