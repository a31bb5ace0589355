"""The models that are measured: the shipped one, and random ones of its kind, made when wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
TINY = PROJECT / "configs/model/tiny"
_M10: dict[str, Any] = {
    "hidden_size": 256,
    "vocab_size": 4096,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "num_attention_heads": 8,
    "head_dim": 32,
    "moe_latent_size": 128,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 768,
    "chunk_size": 64,
}
_M50 = _M10 | {
    "hidden_size": 512,
    "vocab_size": 8192,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "head_dim": 64,
    "moe_latent_size": 256,
    "n_routed_experts": 16,
    "moe_intermediate_size": 1280,
    "moe_shared_expert_intermediate_size": 1024,
}
SIZES = {"tiny": {}, "10m": _M10, "50m": _M50}  # what differs from the tiny model


def folder_of(size: str, parent: Path) -> Path:
    """The checkpoint of that size, in `parent` unless it is the shipped one."""
    if size == "tiny":
        return TINY
    folder = parent / size
    if not folder.exists():
        words = [f"{key}={json.dumps(value)}" for key, value in SIZES[size].items()]
        make = [sys.executable, PROJECT / "tools/make_model.py", folder]
        subprocess.run([*make, "--config", TINY / "config.json", "--set", *words], check=True)
    return folder
