"""DP attention on a CPU: collectives over gloo, and a rank that has nothing to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor


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


PATCHES = {
    "sglang.srt.distributed.parallel_state": _patch_collectives,
    "sglang.srt.layers.attention.torch_native_backend": _patch_attention,
}
