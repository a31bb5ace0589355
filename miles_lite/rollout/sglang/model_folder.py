"""A view of a model folder that SGLang reads as we do.

SGLang has a config class of its own for nemotron_h. It knows one spelling of the layer list, takes
the number of Mamba groups from one key for the weights and from another for the cache, and fills
what is missing with defaults of one old model. The view is a folder with the config spelled out and
links to everything else. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles_lite.models.nemotron_h import NemotronH

_RESPELLED = (
    "layers_block_type",  # transformers 5 says linear_attention and full_attention
    "mtp_layers_block_type",
    "norm_eps",
    "time_step_limit",  # JSON has no infinity, which is its upper end
)


def engine_folder(source: Path, target: Path) -> Path:
    """Make `target`, a new folder, such a view of the HF checkpoint `source`; returns it.

    It costs kilobytes, and whoever starts an engine makes one for it, on its host, in a temporary
    folder that goes when the engine does: a run folder may be on another host, and outlives it.
    """
    model = NemotronH.from_folder(source)
    target.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(engine_config(raw, model), indent=2) + "\n")
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    return target


def engine_config(raw: dict[str, Any], model: NemotronH) -> dict[str, Any]:
    """`raw`, the config.json of `model`, in SGLang's spelling and with nothing left to defaults."""
    config = {key: value for key, value in raw.items() if key not in _RESPELLED}
    config |= {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": model.pattern,
        "num_hidden_layers": model.num_layers,
        "layer_norm_epsilon": model.norm_eps,
        "head_dim": model.head_dim,
        "n_groups": model.mamba_num_groups,  # sizes the cache
        "mamba_n_groups": model.mamba_num_groups,  # sizes the weights; 8 if missing
        "conv_kernel": model.conv_kernel,
        "chunk_size": model.chunk_size,
        "norm_topk_prob": model.norm_topk_prob,
    }
    if model.mtp_pattern:
        config["mtp_hybrid_override_pattern"] = model.mtp_pattern
    else:
        config["num_nextn_predict_layers"] = 0
    return config
