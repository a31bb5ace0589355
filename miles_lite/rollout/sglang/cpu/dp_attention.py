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


def patch_idle_rank(module: Any) -> None:
    """A DP rank without requests returns from a Mamba or attention layer without closing the
    layer's residual, and the next layer refuses it. Nothing in that depends on the device."""

    def forward(self: Any, *, hidden_states: Tensor, forward_batch: Any) -> Any:
        hidden_states = self.boundary.prepare(hidden_states, forward_batch)
        if not forward_batch.forward_mode.is_idle():
            hidden_states = self._forward_mixer(hidden_states, forward_batch)
        return self.boundary.finish(hidden_states, forward_batch)

    module.NemotronHAttnLikeDecoderLayer.forward = forward


PATCHES = {
    "sglang.srt.distributed.parallel_state": _patch_collectives,
    "sglang.srt.layers.attention.torch_native_backend": _patch_attention,
}
