"""Compiled packages that SGLang imports unconditionally and that do not exist for a CPU."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def install() -> None:
    """Before anything of sglang is imported."""
    _declare_torchvision_operators()
    _mock_triton()
    for operator in _SGL_KERNEL_OPERATORS:
        torch.library.define(f"sgl_kernel::{operator}", "() -> ()")
    sys.meta_path.append(_SglKernel())  # last, so that a real package wins


def _declare_torchvision_operators() -> None:
    """torchvision's wheel links CUDA, so its library does not load and its Python part misses two
    operators on import. SGLang imports torchvision for image models only; nothing calls them."""
    if torch.version.cuda is not None:
        return
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )


def _mock_triton() -> None:
    """The triton wheel is a gigabyte and compiles for GPUs only. SGLang carries a stand-in for
    Apple silicon, under which its kernels can be defined though not run; it is installed here by
    pretending to be there. What it adds to torch.mps as well is never looked at on a CPU."""
    if importlib.util.find_spec("triton") is not None:
        return
    package = importlib.util.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'sglang'", name="sglang")
    path = f"{package.submodule_search_locations[0]}/_platform_stubs.py"
    # by its path: importing it from sglang would import sglang, which needs triton
    spec = importlib.util.spec_from_file_location("sglang_platform_stubs", path)
    assert spec is not None and spec.loader is not None
    stubs: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs  # its dataclasses look themselves up
    spec.loader.exec_module(stubs)
    with (
        mock.patch("sys.platform", "darwin"),
        mock.patch("platform.machine", lambda: "arm64"),
        mock.patch("torch.backends.mps.is_available", lambda: True),
    ):
        stubs.install_platform_stubs()


# ------------------------------------------------------------------ sgl_kernel

# read from torch.ops.sgl_kernel when modules of gated delta nets are imported; never called here
_SGL_KERNEL_OPERATORS = ("fused_sigmoid_gating_delta_rule_update_cpu", "fused_gdn_gating_cpu")


def _assign_req_to_token_pool(
    request_rows: Tensor,
    table: Tensor,
    starts: Tensor,
    stops: Tensor,
    slots: Tensor,
    row_len: int,
) -> None:
    """Write the cache slots of each request's new tokens into its row of the table."""
    lens = (stops - starts).tolist()
    spans = zip(request_rows.tolist(), starts.tolist(), slots.split(lens), strict=True)
    for row, start, span in spans:
        table[row, start : start + len(span)] = span.to(table.dtype)


class _SglKernel(MetaPathFinder, Loader):
    """SGLang's own kernels. Their build for CPUs is in no registry, yet on a CPU modules import
    names *_cpu from it at the top. Those are there; one that has no torch version here raises when
    called. Any other name is an ImportError, which SGLang's optional imports expect."""

    names = frozenset(("sgl_kernel", "sgl_kernel.mamba"))
    functions = {"assign_req_to_token_pool_cpu": _assign_req_to_token_pool}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in self.names:
            return importlib.util.spec_from_loader(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.__version__ = "0+cpu"
        module.__getattr__ = self._function

    def _function(self, name: str) -> Any:
        if name in self.functions:
            return self.functions[name]
        if not name.endswith("_cpu"):
            raise AttributeError(f"the CPU shim's sgl_kernel has no {name}")

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} has no torch version in the CPU shim")

        return missing
