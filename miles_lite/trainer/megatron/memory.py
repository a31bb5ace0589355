"""What a trainer rank holds on its device, and taking it off and on again between phases.

Freeing resizes storages to nothing and keeps every tensor and view object alive, so Megatron's
buffers, views and hooks stay valid; Megatron's own gradient offload works the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from miles_lite.protocols import Phase
from miles_lite.trainer.megatron.setup import suspendable_groups


class DeviceMemory:
    """Moves one rank's weights, gradients and optimizer as `Phase` says.

    On a GPU, weights and what the optimizer keeps there leave to pinned host copies (not run on a
    GPU yet: only the moving itself is exercised on CPU). On a CPU the device is the host and they
    stay. An optimizer's state is born in its first step, so it is looked up when it leaves.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        device: torch.device,
        optimizer: Callable[[], list[torch.UntypedStorage]],
    ) -> None:
        self._ddp = ddp
        self._device = device
        module: torch.nn.Module = ddp.module  # megatron does not type it
        self._weights = storages([*module.parameters(), *module.buffers()])
        self._optimizer = optimizer
        self._away: dict[str, Away] = {}
        self._has_grads = True
        self._suspended: list[Any] = []  # process groups whose buffers are off the device

    def enter(self, phase: Phase) -> None:
        for group in self._suspended:
            group.resume()
        self._suspended = []
        self._set_grads(phase is Phase.train)
        self._set("weights", phase is not Phase.generate)
        self._set("optimizer", phase is Phase.train)
        if phase is Phase.generate:  # in the others ranks talk to each other
            self._suspended = suspendable_groups()
            for group in self._suspended:
                group.suspend()

    def take_optimizer(self) -> None:
        """Its state on the device in whatever phase, until the next is entered: to save or load."""
        self._set("optimizer", True)

    def held_bytes(self) -> dict[str, int]:
        """By kind. The kind "device", on a GPU only, is all that any process holds there."""
        ddp: Any = self._ddp  # its `buffers` is a list, unlike that of any other module
        buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
        held = {
            "weights": sum(storage.nbytes() for storage in self._weights),
            "grads": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
            "optimizer": sum(storage.nbytes() for storage in self._of_optimizer()),
        }
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            held["device"] = total - free
        return held

    def _of_optimizer(self) -> list[torch.UntypedStorage]:
        """On this device, apart from what is the model's own."""
        ddp: Any = self._ddp
        grads = [
            b.grad_data.untyped_storage() for b in [*ddp.buffers, *ddp.expert_parallel_buffers]
        ]
        own = {storage._cdata for storage in [*self._weights, *grads]}
        return [
            storage
            for storage in self._optimizer()
            if storage.device.type == self._device.type and storage._cdata not in own
        ]

    def _set_grads(self, wanted: bool) -> None:
        if wanted == self._has_grads:
            return
        if wanted:
            self._ddp.restore_grad_buffers()
        else:
            self._ddp.offload_grad_buffers()
        self._has_grads = wanted

    def _set(self, what: str, wanted: bool) -> None:
        if self._device.type == "cpu" or wanted == (what not in self._away):
            return
        if wanted:
            away = self._away.pop(what)
            await_free(away.num_bytes, self._device)
            away.come_back()
        else:
            leaving = self._weights if what == "weights" else self._of_optimizer()
            self._away[what] = Away(leaving, pin=True)
            torch.cuda.empty_cache()


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


class Away:
    """Storages that lie on the host while their device has better use for the room."""

    def __init__(self, leaving: Sequence[torch.UntypedStorage], pin: bool) -> None:
        self._storages = leaving
        self._host = [
            torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin) for storage in leaving
        ]
        for storage, host in zip(leaving, self._host, strict=True):
            host.copy_(_bytes(storage), non_blocking=True)
        self._wait()
        for storage in leaving:
            storage.resize_(0)

    @property
    def num_bytes(self) -> int:
        return sum(host.numel() for host in self._host)

    def come_back(self) -> None:
        for storage, host in zip(self._storages, self._host, strict=True):
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if any(storage.device.type == "cuda" for storage in self._storages):
            torch.cuda.synchronize()


def storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, in order of first use."""
    found = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.numel()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
