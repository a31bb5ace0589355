"""What a trainer rank holds on its device, and taking it off and on again between phases.

Freeing resizes storages to nothing and keeps every tensor and view object alive, so Megatron's
buffers, views and hooks stay valid; Megatron's own gradient offload works the same way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from miles_lite.protocols import Phase
from miles_lite.trainer.megatron.setup import suspendable_groups


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
        self._sizes = [storage.nbytes() for storage in self._weights]
        self._host: list[torch.Tensor] = []  # pinned, made once: pinning takes seconds a gigabyte
        self._has_weights = self._has_grads = True
        self._suspended: list[Any] = []  # process groups whose buffers are off the device

    def enter(self, phase: Phase) -> None:
        for group in self._suspended:
            group.resume()
        self._suspended = []
        self._set_grads(phase is Phase.train)
        self._set_weights(phase is not Phase.generate)
        if phase is Phase.generate:  # in the others ranks talk to each other
            self._suspended = suspendable_groups()
            for group in self._suspended:
                group.suspend()

    def held_bytes(self) -> dict[str, int]:
        """ "device", on a GPU only, is all that is taken on it, by whatever process."""
        ddp: Any = self._ddp  # its `buffers` is a list, unlike that of any other module
        buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
        held = {
            "weights": sum(storage.nbytes() for storage in self._weights),
            "grads": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        }
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            held["device"] = total - free
        return held

    def _set_grads(self, wanted: bool) -> None:
        if wanted == self._has_grads:
            return
        if wanted:
            self._ddp.restore_grad_buffers()
        else:
            self._ddp.offload_grad_buffers()
        self._has_grads = wanted

    def _set_weights(self, wanted: bool) -> None:
        if self._device.type == "cpu" or wanted == self._has_weights:
            return
        if wanted:
            await_free(sum(self._sizes), self._device)
            for storage, host in zip(self._weights, self._host, strict=True):
                storage.resize_(host.numel())
                _bytes(storage, self._device).copy_(host, non_blocking=True)
            torch.cuda.synchronize()
        else:
            self._host = self._host or [
                torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in self._sizes
            ]
            for storage, host in zip(self._weights, self._host, strict=True):
                host.copy_(_bytes(storage, self._device), non_blocking=True)
            torch.cuda.synchronize()
            for storage in self._weights:
                storage.resize_(0)
            torch.cuda.empty_cache()
        self._has_weights = wanted


def await_free(num_bytes: int, device: torch.device, deadline_s: float = 60.0) -> None:
    """Wait until the device really has so many bytes: another process that has said it let go of
    them may still be at it. Raises RuntimeError (not run on a GPU)."""
    end = time.monotonic() + deadline_s
    while (free := torch.cuda.mem_get_info(device)[0]) < num_bytes:
        if time.monotonic() > end:
            raise RuntimeError(
                f"{num_bytes} bytes are wanted back on {device} but {free} are free after "
                f"{deadline_s:g} s: lower rollout.engine.sglang.mem_fraction_static, or see in "
                "memory/* of metrics.jsonl who holds more than before"
            )
        time.sleep(0.05)


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, in order of first use."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
