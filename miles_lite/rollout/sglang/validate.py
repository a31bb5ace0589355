"""Asks SGLang itself what it makes of options; run by the interpreter that has sglang:

    python -m miles_lite.rollout.sglang.validate

One JSON object on standard input, {"cases": [{options}, ...], "gpu": true}; one on standard output:
for each case what it resolves to or why it is refused. With "gpu" SGLang is told that it is on a
Hopper GPU, so that a laptop or a head node checks what a cluster will run; then values that SGLang
derives from a GPU's memory are not those of the cluster. Starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from miles_lite.rollout.sglang.arguments import server_args

_HOPPER = {
    "is_cuda": True,
    "is_sm90": True,
    "is_hopper_with_cuda_12_3": True,
    "has_flashinfer": True,
    "device_sm": 90,
    "device_capability": (9, 0),
}


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever anyone prints while importing goes to stderr
    request = json.load(sys.stdin)
    if torch.version.cuda is None:  # a CPU build: sglang cannot even be imported without the shim
        from miles_lite.rollout.sglang.cpu import shim

        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        shim.install()
    from sglang.srt.runtime_context import override_platform  # pyright: ignore[reportMissingImports]

    on_gpu = torch.cuda.is_available() or not request["gpu"]
    with contextlib.nullcontext() if on_gpu else override_platform(**_HOPPER):
        cases = [resolve(options) for options in request["cases"]]
    json.dump({"version": version("sglang"), "cases": cases}, answer, default=repr)
    answer.close()


def resolve(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"resolved": {...}} or {"refused": "why"}."""
    try:
        arguments = server_args(options)
        arguments.resolve_once()
        # not the fields of `arguments`: those stay what was asked for
        return {"resolved": arguments.resolved_dict()}
    except (ValueError, AssertionError, RuntimeError, ImportError, OSError) as error:
        # all that SGLang's checks raise; some assert without a word, then their own text must do
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return {"refused": str(error) or f"{type(error).__name__}: {frame.line}"}


if __name__ == "__main__":
    main()
