"""What a `nemotron_h` model is: sizes and layers, read from its HF folder. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from miles_lite.untrusted import parse_object

MAX_SIZE = 1 << 24  # of anything that is counted; the vocabulary of any model is far below
LAYER_KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "dense MLP"}

# transformers, NVIDIA and older checkpoints spell the same layer list in three ways
_BLOCK_TYPES = {
    "mamba": "M",
    "linear_attention": "M",
    "moe": "E",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
}
_BLOCK_NAMES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class NemotronH:
    """Sizes of one model. Symbols in comments are those of the HF config."""

    pattern: str  # one character a layer, of LAYER_KINDS
    mtp_pattern: str  # layers of one multi-token-prediction block; "" without MTP
    vocab_size: int
    hidden_size: int
    norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    mamba_num_groups: int  # n_groups: groups of Mamba's B and C; not n_group, the router's
    conv_kernel: int
    chunk_size: int  # of the state-space scan; changes speed, not results
    dense_ffn_size: int  # of "-" layers
    num_experts: int
    top_k: int  # num_experts_per_tok
    expert_ffn_size: int
    shared_ffn_size: int
    latent_size: int  # width in which experts live; 0 when they see the hidden state
    routed_scaling_factor: float
    norm_topk_prob: bool
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_bc_size(self) -> int:
        """Rows of B (and of C)."""
        return self.mamba_num_groups * self.ssm_state_size

    @property
    def expert_width(self) -> int:
        return self.latent_size or self.hidden_size

    @classmethod
    def from_folder(cls, folder: Path) -> NemotronH:
        """Read config.json (and generation_config.json for stop tokens) of an HF checkpoint."""
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not an HF checkpoint: it has no config.json")
        raw = _read_json(path)
        generation = folder / "generation_config.json"
        if generation.is_file():
            raw["eos_token_id"] = _read_json(generation).get(
                "eos_token_id", raw.get("eos_token_id")
            )
        try:
            return cls.from_hf(raw)
        except KeyError as error:
            raise ValueError(f"{path} does not say {error.args[0]}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> NemotronH:
        """From the parsed config.json; refuses what this code does not implement."""
        if raw.get("model_type") != "nemotron_h":
            raise ValueError(
                f"model_type is {raw.get('model_type')!r}; this version trains 'nemotron_h' only"
            )
        pattern = _pattern(raw, "hybrid_override_pattern", "layers_block_type")
        mtp = _pattern(raw, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
        if not pattern:
            raise ValueError("neither hybrid_override_pattern nor layers_block_type is there")
        _refuse_variants(raw)
        has_experts = "E" in pattern
        eos = raw.get("eos_token_id")
        model = cls(
            pattern=pattern,
            mtp_pattern=mtp if raw.get("num_nextn_predict_layers") else "",
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            norm_eps=raw.get("layer_norm_epsilon", raw.get("norm_eps", 1e-5)),
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // (raw["num_attention_heads"] or 1),
            mamba_num_heads=raw["mamba_num_heads"],
            mamba_head_dim=raw["mamba_head_dim"],
            ssm_state_size=raw["ssm_state_size"],
            mamba_num_groups=raw["n_groups"],
            conv_kernel=raw["conv_kernel"],
            chunk_size=raw.get("chunk_size", 128),
            dense_ffn_size=raw.get("intermediate_size", 0) if "-" in pattern else 0,
            num_experts=raw["n_routed_experts"] if has_experts else 0,
            top_k=raw["num_experts_per_tok"] if has_experts else 0,
            expert_ffn_size=raw["moe_intermediate_size"] if has_experts else 0,
            shared_ffn_size=raw["moe_shared_expert_intermediate_size"] if has_experts else 0,
            latent_size=(raw.get("moe_latent_size") or 0) if has_experts else 0,
            routed_scaling_factor=raw.get("routed_scaling_factor", 1.0) if has_experts else 1.0,
            norm_topk_prob=raw.get("norm_topk_prob", True),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
        _refuse_sizes(model)
        if raw.get("num_hidden_layers", model.num_layers) != model.num_layers:
            raise ValueError(
                f"num_hidden_layers = {raw['num_hidden_layers']} but the layer pattern "
                f"{pattern!r} has {model.num_layers} layers"
            )
        return model


# Fields that are 0 where a model has no such layers.
_OF_LAYERS = {
    "dense_ffn_size": "-",
    "num_experts": "E",
    "top_k": "E",
    "expert_ffn_size": "E",
    "shared_ffn_size": "E",
}


def _refuse_sizes(model: NemotronH) -> None:
    """Numbers that no model has, before anything is allocated by them."""
    for field in fields(model):
        name, value = field.name, getattr(model, field.name)
        if field.type == "int":
            low = int(name != "latent_size" and _OF_LAYERS.get(name, "M") in model.pattern + "M")
            if type(value) is not int or not low <= value <= MAX_SIZE:
                raise ValueError(f"{name} = {value!r}: wanted {low} to {MAX_SIZE:,}")
        elif field.type == "float" and not (
            isinstance(value, float | int) and math.isfinite(value) and value > 0
        ):
            raise ValueError(f"{name} = {value!r}: wanted a number above 0")
        elif field.type == "bool" and type(value) is not bool:
            raise ValueError(f"{name} = {value!r}: wanted true or false")
    for token in model.eos_token_ids:
        if type(token) is not int or not 0 <= token < model.vocab_size:
            raise ValueError(f"eos_token_id {token!r} is none of {model.vocab_size} tokens")


def spell_pattern(path: Path) -> None:
    """Write the layers of a config.json as strings too, and a list of them in the names that
    transformers and SGLang both read: SGLang refuses those that transformers writes."""
    raw = _read_json(path)
    model = NemotronH.from_hf(raw)
    spelled: dict[str, Any] = {"hybrid_override_pattern": model.pattern}
    if model.mtp_pattern:
        spelled["mtp_hybrid_override_pattern"] = model.mtp_pattern
    for key in ("layers_block_type", "mtp_layers_block_type"):
        if raw.get(key):
            spelled[key] = [_BLOCK_NAMES[_BLOCK_TYPES[kind]] for kind in raw[key]]
    if raw != raw | spelled:
        path.write_text(json.dumps(raw | spelled, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    return parse_object(path.read_bytes(), str(path))


def context_length(folder: Path) -> int:
    """Tokens of prompt and answer together that the model was made for."""
    longest = _read_json(folder / "config.json").get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        raise ValueError(
            f"{folder / 'config.json'} does not say max_position_embeddings, but {longest!r}"
        )
    return longest


def _pattern(raw: dict[str, Any], string_key: str, list_key: str) -> str:
    """The layer pattern as one string, from either spelling; "" when neither is there."""
    if pattern := raw.get(string_key):
        for char in pattern:
            if char not in LAYER_KINDS:
                raise ValueError(
                    f"{string_key} = {pattern!r}: {char!r} is not one of {' '.join(LAYER_KINDS)}"
                )
        return pattern
    kinds = raw.get(list_key) or []
    for kind in kinds:
        if kind not in _BLOCK_TYPES:
            raise ValueError(
                f"{list_key} holds {kind!r}; known kinds are {', '.join(_BLOCK_TYPES)}"
            )
    return "".join(_BLOCK_TYPES[kind] for kind in kinds)


def _refuse_variants(raw: dict[str, Any]) -> None:
    """Config values that would change the maths and that no published Nemotron 3 sets."""
    expected: dict[str, tuple[Any, ...]] = {
        "tie_word_embeddings": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "use_conv_bias": (True,),
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu",),
        "n_group": (1, None),
        "topk_group": (1, None),
        "n_shared_experts": (1,),
        "sliding_window": (None,),
        "residual_in_fp32": (False,),
    }
    for key, allowed in expected.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(
                f"{key} = {raw[key]!r} is not supported, only {' or '.join(map(repr, allowed))}"
            )
