"""Weights of a CPU engine in the shapes that a GPU gives them."""

from __future__ import annotations

from typing import Any


def _keep_sizes(module: Any) -> None:
    """On a CPU SGLang rounds head counts and intermediate widths up to what its AMX kernels like.
    Those kernels are not here, and the sizes that run are those that a GPU engine accepts too."""

    def unchanged(model_config: Any, load_config: Any, tp_size: int) -> Any:
        return model_config

    module.adjust_config_with_unaligned_cpu_tp = unchanged


PATCHES = {"sglang.srt.configs.update_config": _keep_sizes}
