"""What a trainer rank holds on its device, and taking it off and on again between phases.

Freeing resizes storages to nothing and keeps every tensor and view object alive, so Megatron's
buffers, views and hooks stay valid; Megatron's own gradient offload works the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from miles_lite.protocols import Phase


class DeviceMemory:
    """Moves one rank's weights and gradients as `Phase` says.

    On a GPU, weights leave to pinned host copies (not run on a GPU yet: only the host side of this
    is exercised on CPU). On a CPU the device is the host and weights stay.
    """

    def __init__(self, ddp: DistributedDataParallel, device: torch.device) -> None:
        self._ddp = ddp
        self._device = device
        module: torch.nn.Module = ddp.module  # megatron does not type it
        self._weights = _storages([*module.parameters(), *module.buffers()])
        self._host: list[torch.Tensor] = []  # pinned copies while weights are off the device
        self._has_grads = True

    def enter(self, phase: Phase) -> None:
        self._set_grads(phase is Phase.train)
        self._set_weights(phase is not Phase.generate)

    def held_bytes(self) -> dict[str, int]:
        ddp: Any = self._ddp  # its `buffers` is a list, unlike that of any other module
        buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
        return {
            "weights": sum(storage.nbytes() for storage in self._weights),
            "grads": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        }

    def _set_grads(self, wanted: bool) -> None:
        if wanted == self._has_grads:
            return
        if wanted:
            self._ddp.restore_grad_buffers()
        else:
            self._ddp.offload_grad_buffers()
        self._has_grads = wanted

    def _set_weights(self, wanted: bool) -> None:
        if self._device.type == "cpu" or wanted == (not self._host):
            return
        if wanted:
            for storage, host in zip(self._weights, self._host, strict=True):
                storage.resize_(host.numel())
                _bytes(storage, self._device).copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            self._host = []
        else:
            for storage in self._weights:
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                host.copy_(_bytes(storage, self._device), non_blocking=True)
                self._host.append(host)
            torch.cuda.synchronize()
            for storage in self._weights:
                storage.resize_(0)
            torch.cuda.empty_cache()


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, in order of first use."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
