"""What a trainer rank holds on its device, and taking it off and on again between phases.

Freeing resizes storages to nothing and keeps every tensor and view object alive, so Megatron's
buffers, views and hooks stay valid; Megatron's own gradient offload works the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
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
        optimizer: Callable[[], Mapping[torch.UntypedStorage, torch.Tensor | None]],
    ) -> None:
        """optimizer: what it keeps or updates, and for what an offloaded one has on the host too,
        that copy."""
        self._ddp = ddp
        self._device = device
        module: torch.nn.Module = ddp.module  # megatron does not type it
        self._weights = storages([*module.parameters(), *module.buffers()])
        self._optimizer = optimizer
        self._away = {what: Away(pin=True) for what in ("weights", "optimizer")}
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

    def _of_optimizer(self) -> dict[torch.UntypedStorage, torch.Tensor | None]:
        """On this device, apart from what is the model's own."""
        ddp: Any = self._ddp
        grads = [
            b.grad_data.untyped_storage() for b in [*ddp.buffers, *ddp.expert_parallel_buffers]
        ]
        own = {storage._cdata for storage in [*self._weights, *grads]}
        return {
            storage: copy
            for storage, copy in self._optimizer().items()
            if storage.device.type == self._device.type and storage._cdata not in own
        }

    def _set_grads(self, wanted: bool) -> None:
        if wanted == self._has_grads:
            return
        if wanted:
            self._ddp.restore_grad_buffers()
        else:
            self._ddp.offload_grad_buffers()
        self._has_grads = wanted

    def _set(self, what: str, wanted: bool) -> None:
        away = self._away[what]
        if self._device.type == "cpu" or wanted != away.is_away:
            return
        if wanted:
            await_free(away.num_bytes, self._device)
            away.come_back()
        else:
            away.leave(dict.fromkeys(self._weights) if what == "weights" else self._of_optimizer())
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
    """Storages that lie on the host while their device has better use for the room.

    Host copies are made once: pinning memory is slow.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._copies: dict[int, torch.Tensor] = {}  # by storage
        self._gone: list[torch.UntypedStorage] = []

    @property
    def is_away(self) -> bool:
        return bool(self._gone)

    def leave(self, leaving: Mapping[torch.UntypedStorage, torch.Tensor | None]) -> None:
        """Each with the host tensor to copy it to, of as many bytes, or None for one of our own."""
        for storage, copy in leaving.items():
            if storage._cdata not in self._copies:
                self._copies[storage._cdata] = self._host(storage) if copy is None else copy
            _bytes(self._copies[storage._cdata].untyped_storage()).copy_(
                _bytes(storage), non_blocking=True
            )
        _wait(leaving)
        self._gone = list(leaving)
        for storage in leaving:
            storage.resize_(0)

    @property
    def num_bytes(self) -> int:
        """That it takes to come back."""
        return sum(self._copies[storage._cdata].nbytes for storage in self._gone)

    def come_back(self) -> None:
        for storage in self._gone:
            copy = self._copies[storage._cdata].untyped_storage()
            storage.resize_(copy.nbytes())
            _bytes(storage).copy_(_bytes(copy), non_blocking=True)
        _wait(self._gone)
        self._gone = []

    def _host(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._pin)


def _wait(moved: Iterable[torch.UntypedStorage]) -> None:
    if any(storage.device.type == "cuda" for storage in moved):
        torch.cuda.synchronize()


def storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, in order of first use."""
    found = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.numel()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
