"""Replacing names in a module as it is imported, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from miles_lite.rollout.sglang import hooks

PROJECT = Path(__file__).resolve().parents[3]


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{PROJECT}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_name_is_replaced_before_another_module_copies_it(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("def answer(): return 1\n")
    (tmp_path / "user.py").write_text("from library import answer\n")
    done = run(
        tmp_path,
        "from miles_lite.rollout.sglang import hooks\n"
        "hooks.after_import({'library': lambda m: setattr(m, 'answer', lambda: 2)})\n"
        "import user; print(user.answer())\n",
    )
    assert done.stdout == "2\n", done.stderr


def test_a_module_that_is_there_already_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"before they could be patched: json"):
        hooks.after_import({"json": lambda module: None})


def test_the_shim_is_nothing_to_a_process_that_does_not_install_it(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import sys; before = list(sys.meta_path)\n"
        "import miles_lite.rollout.sglang.server, miles_lite.rollout.sglang.cpu.shim\n"
        "assert sys.meta_path == before and 'sgl_kernel' not in sys.modules\n"
        "import torch; print(hasattr(torch.ops.sgl_kernel, 'fused_gdn_gating_cpu'))\n",
    )
    assert done.stdout == "False\n", done.stderr
