"""Where a run took place: what somebody needs to repeat it, and nothing that is secret.

Environment variables are not recorded: they carry keys. Nothing here imports what it reports on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from miles_lite.redact import redacted_settings

PROJECT = Path(__file__).resolve().parent.parent

CODE = ("miles_lite", "configs", "rewards")  # folders of the project that a run reads
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
        "command": redacted_settings(sys.argv),
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


def code_digests(project: Path) -> dict[str, str]:
    """Of every file that a process of a run may read of the project."""
    files = [
        path
        for folder in CODE
        for path in (project / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return {
        str(path.relative_to(project)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(files)
    }


def gpu_names() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    return (output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _git() -> dict[str, Any] | None:
    """Commit of the project, and whether its files differ; None if it is not a checkout itself."""

    def git(*words: str) -> str | None:
        return output("git", "-C", str(PROJECT), *words)

    top = git("rev-parse", "--show-toplevel")
    commit = git("rev-parse", "--verify", "HEAD")
    if not top or not commit or Path(top).resolve() != PROJECT:
        return None
    return {"commit": commit, "dirty": git("status", "--porcelain") != ""}


def output(*command: str) -> str | None:
    """What a command prints, or None if there is no such command, it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
