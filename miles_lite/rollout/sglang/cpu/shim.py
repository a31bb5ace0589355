"""The unmodified sglang wheel, on a CPU: everything it takes from CUDA, supplied in plain torch.

Active only where `install` is called, which the launcher does for device cpu: in the server and,
because SGLang spawns its processes from the launcher's main module, in each of its children. The
code of sglang that runs is the same as on a GPU except for what the modules beside this one name.
"""

from __future__ import annotations

from typing import Any

from miles_lite.rollout.sglang import hooks, idle_rank
from miles_lite.rollout.sglang.cpu import (
    dp_attention,
    kernels,
    mamba,
    memory,
    moe,
    sampling,
    unpadded,
)


def install() -> None:
    """Before the first import of sglang, in every process."""
    kernels.install()
    hooks.after_import(
        {
            **mamba.PATCHES,
            **moe.PATCHES,
            **dp_attention.PATCHES,
            **memory.PATCHES,
            **unpadded.PATCHES,
            **sampling.PATCHES,
            idle_rank.MODULE: _patch_model,
        }
    )


def _patch_model(module: Any) -> None:
    moe.patch_router(module)
    idle_rank.mend(module)
