"""Megatron's DDP and Adam around the model: gradient buffers, (distributed, offloaded) optimizer.

Import only after cpu_compat.install().
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config

from miles_lite.config import OptimConfig


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; nothing was applied to the weights."""


def wrap_ddp(model: torch.nn.Module, distributed: bool) -> DistributedDataParallel:
    """Gradient buffers in fp32, reduced over data-parallel ranks."""
    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        ),
        model,
    )


def use_distributed_optimizer(optim: OptimConfig, dtype: torch.dtype) -> bool:
    """Whether optimizer state is sharded over DP ranks: always, but for one hole in Megatron.

    An offloaded, sharded fp32 optimizer would optimize views, which torch refuses ("non-leaf").
    """
    return not (optim.cpu_offload and dtype is torch.float32)


class Optimizer:
    """Megatron's optimizer with our schedule. All ranks call the same methods in the same order."""

    def __init__(
        self, ddp: DistributedDataParallel, optim: OptimConfig, dtype: torch.dtype
    ) -> None:
        self._optim = optim
        self._updates = 0
        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=use_distributed_optimizer(optim, dtype),
            optimizer_cpu_offload=optim.cpu_offload,
            optimizer_offload_fraction=1.0 if optim.cpu_offload else 0.0,
            overlap_cpu_optimizer_d2h_h2d=optim.cpu_offload and torch.cuda.is_available(),
            pin_cpu_grads=torch.cuda.is_available(),
            pin_cpu_params=torch.cuda.is_available(),
        )
        self.inner: Any = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
        self._refuse_non_finite_norm()

    def reload_masters(self) -> None:
        """Take the fp32 masters from the model again; needed whenever weights were loaded into it.

        Without it the first step would put back the weights the model was built with.
        """
        self.inner.reload_model_params()

    def learning_rate(self) -> float:
        """Of the next update: linear warm-up, then constant."""
        warmup = self._optim.warmup_updates
        return self._optim.lr * min(1.0, (self._updates + 1) / warmup if warmup else 1.0)

    def step(self) -> float:
        """Clip and apply the gradients; the global gradient norm before clipping.

        Raises NonFiniteError on every rank, with the weights as they were.
        """
        for group in self.inner.param_groups:
            group["lr"] = self.learning_rate() * group.get("lr_mult", 1.0)
            # Megatron exempts 1-D parameters through this factor, which its own scheduler applies
            group["weight_decay"] = self._optim.weight_decay * group.get("wd_mult", 1.0)
        applied, norm, _ = self.inner.step()
        assert applied, "the optimizer skipped an update without a loss scale to blame"
        self._updates += 1
        return float(norm)

    def state_bytes(self) -> int:
        """Bytes of optimizer state in this process, masters that are copies included."""
        seen: dict[int, int] = {}
        for inner in getattr(self.inner, "chained_optimizers", [self.inner]):
            if (torch_optimizer := inner.optimizer) is None:
                continue
            for state in torch_optimizer.state.values():
                for value in state.values():
                    if torch.is_tensor(value):
                        storage = value.untyped_storage()
                        seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def _refuse_non_finite_norm(self) -> None:
        """Megatron would clip by a NaN norm, which makes every weight NaN: stop it before."""
        norm_of = self.inner.get_grad_norm

        def checked() -> float:
            norm = norm_of()
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"gradient norm is {norm} at update {self._updates}; no weight was changed"
                )
            return norm

        self.inner.get_grad_norm = checked
