"""DP attention on a CPU: collectives over gloo, and a rank that has nothing to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

CONTROLLER_POLL_MS = 1000  # it must say that it is alive now and then


def _patch_collectives(module: Any) -> None:
    """The reduce-scatter into unequal parts exists for NCCL only."""

    def reduce_scatterv(
        self: Any, input_: Tensor, output: Tensor | None = None, sizes: list[int] | None = None
    ) -> Tensor:
        # upstream's own way without NCCL, which it takes for reproducible sums only
        return self._deterministic_reduce_scatterv(input_, output, sizes)

    module.GroupCoordinator.reduce_scatterv = reduce_scatterv


def _patch_attention(module: Any) -> None:
    """Padding a batch asks the attention back-end which length a padded row has; on a CPU only the
    AMX back-end answers. One is what it and the others say: a row attends to itself."""
    module.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def _patch_controller(module: Any) -> None:
    """The process that deals requests to DP ranks asks for them without a pause, which takes a core
    from the ranks."""

    def event_loop(self: Any) -> None:
        while True:
            self.soft_watchdog.feed()
            if self.recv_from_tokenizer.poll(CONTROLLER_POLL_MS):
                self._request_dispatcher(module.sock_recv(self.recv_from_tokenizer))

    module.DataParallelController.event_loop = event_loop


PATCHES = {
    "sglang.srt.managers.data_parallel_controller": _patch_controller,
    "sglang.srt.distributed.parallel_state": _patch_collectives,
    "sglang.srt.layers.attention.torch_native_backend": _patch_attention,
}
