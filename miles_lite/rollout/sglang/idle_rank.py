"""DP attention with a rank that has nothing to do: a mend of SGLang's Nemotron-H, on every device.

Such a rank returns from a Mamba or attention layer without closing the layer's residual, and the
next layer refuses it ("written residual does not match the supplied output"), which ends the
server. Found on a CPU; nothing in that code asks for the device, so the mend is applied on GPUs
too, where it was not run.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

MODULE = "sglang.srt.models.nemotron_h"
VERSIONS = ("0.5.23",)  # that have the fault


def mend(module: Any) -> None:
    """Of a version not known to have the fault, nothing is changed."""
    if version("sglang") in VERSIONS:
        module.NemotronHAttnLikeDecoderLayer.forward = _forward


def _forward(self: Any, *, hidden_states: Tensor, forward_batch: Any) -> Any:
    hidden_states = self.boundary.prepare(hidden_states, forward_batch)
    if not forward_batch.forward_mode.is_idle():
        hidden_states = self._forward_mixer(hidden_states, forward_batch)
    return self.boundary.finish(hidden_states, forward_batch)
