"""Where a run took place: what somebody needs to repeat it, and nothing that is secret.

Environment variables are not recorded: they carry keys. Nothing here imports what it reports on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "miles-lite torch megatron-core ray transformers safetensors numpy hydra-core omegaconf sympy "
    "transformer-engine mamba-ssm causal-conv1d sglang triton wandb"
).split()


def describe() -> dict[str, Any]:
    """Of the driver's machine, for environment.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "hostname": platform.node(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(),
        "git": _git(),
        "command": sys.argv,
        "folder": os.getcwd(),
    }


def package_versions() -> dict[str, str]:
    """Of those that are installed and matter to a run."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _git() -> dict[str, Any] | None:
    """Commit of the project, and whether its files differ; None if it is not a checkout itself."""

    def git(*words: str) -> str | None:
        return _output("git", "-C", str(PROJECT), *words)

    top = git("rev-parse", "--show-toplevel")
    commit = git("rev-parse", "--verify", "HEAD")
    if not top or not commit or Path(top).resolve() != PROJECT:
        return None
    return {"commit": commit, "dirty": git("status", "--porcelain") != ""}


def _output(*command: str) -> str | None:
    """What a command prints, or None if there is no such command, it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
