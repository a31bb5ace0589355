"""Memory on a CPU: host buffers, and releasing what cannot be released."""

from __future__ import annotations

from typing import Any

import torch


def _patch_host_buffers(module: Any) -> None:
    """Buffers for routed experts are registered with CUDA for fast copies. On a CPU there is
    nothing to copy from."""

    def allocate(
        dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any
    ) -> torch.Tensor:
        return allocator.allocate(dims, dtype=dtype, device=device)

    module.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _patch_memory_saver(module: Any) -> None:
    """enable_memory_saver wants a package that replaces CUDA's allocator. The stand-in keeps the
    flag, the calls and their order, and no memory."""

    class StandIn(module._TorchMemorySaverAdapterNoop):
        enabled = True

    def create(enable: bool) -> Any:
        return StandIn() if enable else module._TorchMemorySaverAdapterNoop()

    module.TorchMemorySaverAdapter.create = staticmethod(create)


def _patch_release(module: Any) -> None:
    """On a GPU released weights come back as whatever lies there. Here they come back as NaN, so
    that a weight which nobody sends again is seen at once."""
    manager = module.SchedulerWeightUpdaterManager
    upstream = manager.release_memory_occupation

    def release_memory_occupation(self: Any, request: Any) -> Any:
        reply = upstream(self, request)
        from sglang.srt.runtime_context import get_exec  # pyright: ignore[reportMissingImports]

        backed_up = get_exec().features.enable_weights_cpu_backup
        released = module.GPU_MEMORY_TYPE_WEIGHTS in (request.tags or module.GPU_MEMORY_ALL_TYPES)
        if released and self.memory_saver_adapter.enabled and not backed_up:
            with torch.no_grad():
                for parameter in self.tp_worker.model_runner.model.parameters():
                    parameter.fill_(torch.nan)
        return reply

    manager.release_memory_occupation = release_memory_occupation


PATCHES = {
    "sglang.srt.mem_cache.pool_host.common": _patch_host_buffers,
    "sglang.srt.utils.torch_memory_saver_adapter": _patch_memory_saver,
    "sglang.srt.managers.scheduler_components.weight_updater": _patch_release,
}
