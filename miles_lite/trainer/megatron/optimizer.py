"""Megatron's DDP and Adam around the model: gradient buffers, (distributed, offloaded) optimizer.

Import only after cpu_compat.install().
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import get_model_config

from miles_lite.config import OptimConfig
from miles_lite.trainer.megatron.memory import storages


class NonFiniteNorm(RuntimeError):
    """The gradient's norm is NaN or infinite; nothing was applied to the weights."""

    def __init__(self, norm: float, update: int) -> None:
        super().__init__(f"gradient norm is {norm} at update {update}; no weight was changed")
        self.norm = norm


def wrap_ddp(model: torch.nn.Module) -> DistributedDataParallel:
    """Gradient buffers in fp32, scattered over data-parallel ranks."""
    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        model,
    )


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
            use_distributed_optimizer=True,
            optimizer_cpu_offload=optim.cpu_offload,
            optimizer_offload_fraction=1.0 if optim.cpu_offload else 0.0,
            overlap_cpu_optimizer_d2h_h2d=optim.cpu_offload and torch.cuda.is_available(),
            pin_cpu_grads=torch.cuda.is_available(),
            pin_cpu_params=torch.cuda.is_available(),
        )
        with _shards_are_leaves():
            self.inner: Any = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
        self._refuse_non_finite_norm()
        for each in self._parts():
            _number_params(each)
            if optim.cpu_offload:
                _make_loadable(each)

    @property
    def num_updates(self) -> int:
        """Applied so far."""
        return self._updates

    def _parts(self) -> list[Any]:
        """Megatron keeps one optimizer for dense weights and, with EP > 1, one for experts."""
        return getattr(self.inner, "chained_optimizers", [self.inner])

    def state(self, weights: Any, loading: bool, metadata: dict[str, Any]) -> dict[Any, Any]:
        """Megatron's sharded state dict, to save or to load into. `weights`: the model's."""
        state = self.inner.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        for part in (state, state.get(0, {}), state.get(1, {})):
            for group in part.get("optimizer", {}).get("param_groups", []):
                # which classes an offloaded optimizer uses: no matter of a checkpoint, and such a
                # pickle would be refused
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]
        return state

    def load_state(self, state: dict[Any, Any], num_updates: int) -> None:
        """Take over a loaded state of any layout, and the number of updates behind it."""
        self.inner.load_state_dict(_for_parts(state, len(self._parts())))
        self._updates = num_updates
        for each in self._parts():
            for group in each.optimizer.param_groups:
                group.update({k: v for k, v in each.optimizer.defaults.items() if k not in group})
            # an offloaded optimizer updates copies on the host, which loading does not know of
            for param, copied in getattr(each.optimizer, "param_to_inner_param", {}).items():
                copied.data.copy_(param.data)

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

        Raises NonFiniteNorm on every rank, with the weights as they were.
        """
        for group in self.inner.param_groups:
            group["lr"] = self.learning_rate() * group.get("lr_mult", 1.0)
            # Megatron exempts 1-D parameters through this factor, which its own scheduler applies
            group["weight_decay"] = self._optim.weight_decay * group.get("wd_mult", 1.0)
        applied, norm, _ = self.inner.step()
        assert applied, "the optimizer skipped an update without a loss scale to blame"
        self._updates += 1
        return float(norm)

    def storages(self) -> dict[torch.UntypedStorage, torch.Tensor | None]:
        """All that it updates or keeps, wherever it lies: moments, masters, and what an offloaded
        one has on the host. A master that is no copy is the model's own weight. Counters aside.

        With each, the copy that an offloaded optimizer updates in its place, if it has one.
        """
        found: list[torch.Tensor] = []
        copies: dict[int, torch.Tensor] = {}
        for inner in self._parts():
            if (torch_optimizer := inner.optimizer) is None:
                continue
            for group in torch_optimizer.param_groups:
                found += group["params"]
            for state in torch_optimizer.state.values():
                found += [v for v in state.values() if torch.is_tensor(v) and v.dim()]
            on_host = getattr(torch_optimizer, "gpu_params_map_cpu_copy", {})
            found += on_host.values()
            copies |= {p.untyped_storage()._cdata: copy for p, copy in on_host.items()}
            for kept in ("cpu_copy_map_grad", "param_to_fp32_param"):
                found += getattr(torch_optimizer, kept, {}).values()
        return {storage: copies.get(storage._cdata) for storage in storages(found)}

    def _refuse_non_finite_norm(self) -> None:
        """Megatron would clip by a NaN norm, which makes every weight NaN: stop it before."""
        norm_of = self.inner.get_grad_norm

        def checked() -> float:
            norm = norm_of()
            if not math.isfinite(norm):
                raise NonFiniteNorm(norm, self._updates)
            return norm

        self.inner.get_grad_norm = checked


@contextlib.contextmanager
def _shards_are_leaves() -> Iterator[None]:
    """DistributedOptimizer makes the shard of an fp32 parameter a view of it with a graph, which
    torch refuses to optimize ("non-leaf") as soon as the optimizer is offloaded: cut them off."""
    name = "_build_model_and_main_param_groups"
    build = getattr(DistributedOptimizer, name)

    def built(gbuf_ranges: Any, param_map: Any, group_ranges: Any, config: Any) -> Any:
        found = build(gbuf_ranges, param_map, group_ranges, config)
        _, _, _, fp32_shards, masters = found
        for group_range, shards, copies in zip(group_ranges, fp32_shards, masters, strict=True):
            shards[:] = [_leaf(shard) for shard in shards]
            group_range["orig_group"]["params"] = [*shards, *copies]
        return found

    setattr(DistributedOptimizer, name, staticmethod(built))
    try:
        yield
    finally:
        setattr(DistributedOptimizer, name, build)


def _leaf(view: torch.Tensor) -> torch.Tensor:
    """The same memory and marks without a graph."""
    leaf = view.detach().requires_grad_()
    for mark, value in vars(view).items():
        setattr(leaf, mark, value)
    return leaf


def _for_parts(state: dict[Any, Any], num_parts: int) -> dict[Any, Any]:
    """Megatron's state with one part per optimizer (EP > 1), or flat (EP = 1): make the one the
    other. The tensors have the same keys; only lists of parameter groups differ."""
    kind = "param_state_sharding_type"
    if num_parts == 1 and 0 in state:
        merged = [
            {**group, "is_expert_parallel": False}
            for part in (0, 1)
            for group in state[part]["optimizer"]["param_groups"]
        ]
        flat = {key: value for key, value in state.items() if key not in (0, 1)}
        flat.setdefault(kind, state[0].get(kind))
        return {**flat, "optimizer": {**state[0]["optimizer"], "param_groups": merged}}
    if num_parts == 2 and "optimizer" in state:
        for part in (0, 1):
            of_part = [
                {**group, "is_expert_parallel": bool(part)}
                for group in state["optimizer"]["param_groups"]
            ]
            state[part]["optimizer"] = {**state["optimizer"], "param_groups": of_part}
            state[part].setdefault(kind, state.get(kind))
        return {part: state[part] for part in (0, 1)}
    return state


def _make_loadable(optimizer: Any) -> None:
    """Loading an offloaded DistributedOptimizer stumbles over two things (megatron-core 0.16)."""
    offloaded = optimizer.optimizer
    offloaded.param_update_in_fp32 = False  # no-op, as all it is given is fp32 already
    set_states = optimizer._set_main_param_and_optimizer_states

    def with_step(model_param: Any, tensors: dict[str, Any]) -> None:
        # torch's Adam on the host counts steps in a tensor of each parameter, which the checkpoint
        # has in the parameter groups and which is set from there
        group, position = optimizer.model_param_group_index_map[model_param]
        state = offloaded.state[offloaded.param_groups[group]["params"][position]]
        set_states(model_param, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = with_step


def _number_params(optimizer: Any) -> None:
    """Where a group holds bf16 and fp32 parameters, DistributedOptimizer counts the positions of
    each kind from 0, and saving then mixes up their states: number them as the groups hold them."""
    if not hasattr(optimizer, "model_param_group_index_map"):
        return
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for group, (fp32, low) in enumerate(groups):
        for position, param in enumerate([*fp32, *low]):
            optimizer.model_param_group_index_map[param] = (group, position)
