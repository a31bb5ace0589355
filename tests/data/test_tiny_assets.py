"""What is shipped under configs/model/tiny and configs/data/tiny is what the rest relies on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles_lite.config import SourceConfig
from miles_lite.data.source import RenderSettings, open_source
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.models.nemotron_h import NemotronH

MIB = 2**20
FP32_SUFFIXES = (".A_log", ".D", ".dt_bias", ".e_score_correction_bias")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> NemotronH:
    return NemotronH.from_folder(tiny_model)


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_model / "model.safetensors")


def layer_shapes(model: NemotronH, kind: str) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer, by HF name below `layers.N.`."""
    hidden, inner, bc = model.hidden_size, model.mamba_inner_size, model.mamba_bc_size
    heads, channels = model.mamba_num_heads, inner + 2 * bc
    width, latent = model.expert_ffn_size, model.latent_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)}
    if kind == "M":
        shapes |= {f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
        shapes |= {
            "mixer.in_proj.weight": (inner + channels + heads, hidden),
            "mixer.conv1d.weight": (channels, 1, model.conv_kernel),
            "mixer.conv1d.bias": (channels,),
            "mixer.norm.weight": (inner,),
            "mixer.out_proj.weight": (hidden, inner),
        }
    elif kind == "*":
        shapes |= {
            "mixer.q_proj.weight": (q, hidden),
            "mixer.k_proj.weight": (kv, hidden),
            "mixer.v_proj.weight": (kv, hidden),
            "mixer.o_proj.weight": (hidden, q),
        }
    elif kind == "E":
        shapes |= {
            "mixer.gate.weight": (model.num_experts, hidden),
            "mixer.gate.e_score_correction_bias": (model.num_experts,),
            "mixer.fc1_latent_proj.weight": (latent, hidden),
            "mixer.fc2_latent_proj.weight": (hidden, latent),
            "mixer.shared_experts.up_proj.weight": (model.shared_ffn_size, hidden),
            "mixer.shared_experts.down_proj.weight": (hidden, model.shared_ffn_size),
        }
        for expert in range(model.num_experts):
            shapes[f"mixer.experts.{expert}.up_proj.weight"] = (width, latent)
            shapes[f"mixer.experts.{expert}.down_proj.weight"] = (latent, width)
    return shapes


def expected(model: NemotronH) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden_size
    yield "backbone.embeddings.weight", (model.vocab_size, hidden)
    yield "backbone.norm_f.weight", (hidden,)
    yield "lm_head.weight", (model.vocab_size, hidden)
    for prefix, pattern in (("backbone", model.pattern), ("mtp", model.mtp_pattern)):
        for index, kind in enumerate(pattern):
            for name, shape in layer_shapes(model, kind).items():
                yield f"{prefix}.layers.{index}.{name}", shape
    yield "mtp.layers.0.eh_proj.weight", (hidden, 2 * hidden)
    yield "mtp.layers.0.enorm.weight", (hidden,)
    yield "mtp.layers.0.hnorm.weight", (hidden,)
    yield f"mtp.layers.{len(model.mtp_pattern) - 1}.final_layernorm.weight", (hidden,)


def test_model_has_what_the_large_ones_have(model: NemotronH) -> None:
    assert set(model.pattern) == set("ME*")
    assert model.mtp_pattern == "*E"
    assert model.num_layers % 4 == 0  # pipeline stages
    quarter = model.num_layers // 4
    stages = [model.pattern[i : i + quarter] for i in range(0, model.num_layers, quarter)]
    assert len(set(stages)) == 4  # a layer on the wrong stage has the wrong shapes
    assert model.vocab_size % 4 == model.mamba_num_heads % 4 == model.num_experts % 4 == 0
    assert (model.num_kv_heads, model.mamba_num_groups) == (2, 2)
    assert 0 < model.latent_size < model.hidden_size
    assert model.routed_scaling_factor == 2.5


def test_config_says_nothing_about_a_clamp_and_both_group_keys_agree(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    assert "time_step_limit" not in config
    assert config["n_groups"] == config["mamba_n_groups"]


def test_every_tensor_is_accounted_for(model: NemotronH, tensors: dict[str, torch.Tensor]) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(expected(model))


def test_values(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name
        assert tensor.any(), f"{name} is all zero"
        is_clean = torch.equal(tensor, tensor.bfloat16().float())
        if not name.endswith(FP32_SUFFIXES):
            assert is_clean, f"{name} loses bits in bf16"
        elif name.endswith("e_score_correction_bias"):
            assert not is_clean, f"{name} must show when it is cast to bf16"


def test_transformers_loads_it_completely(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert model.dtype == torch.float32


def test_stop_token_and_vocabulary_agree(model: NemotronH, tokenizer: ChatTokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == model.eos_token_ids
    text = "".join(map(chr, range(32, 127))) + "\n<|im_start|><think></think><pad><unk>"
    assert max(tokenizer.encode(text)) < model.vocab_size


def test_folder_is_small(tiny_model: Path) -> None:
    files = {path.name: path.stat().st_size for path in tiny_model.iterdir()}
    assert sum(files.values()) < 2.5 * MIB, files


def test_data(tiny_data: Path, tokenizer: ChatTokenizer) -> None:
    splits = {}
    for name, num_rows in (("train", 3000), ("eval", 200)):
        rows = [json.loads(line) for line in (tiny_data / f"{name}.jsonl").open()]
        assert len(rows) == num_rows
        for row in rows:
            assert row.keys() == {"prompt", "label"}
            (message,) = row["prompt"]
            found = re.fullmatch(r"What is (\d+)\+(\d+)\?", message["content"])
            assert found, message
            assert row["label"] == str(int(found[1]) + int(found[2]))
        splits[name] = {row["prompt"][0]["content"] for row in rows}
        assert len(splits[name]) == num_rows
        source = SourceConfig(path=f"{tiny_data / name}.jsonl[:200]")
        render = RenderSettings(tokenizer, {}, 19, max_too_long_ratio=0.0, rewards={""})
        prompts = open_source(name, source, render).all()
        assert len(prompts) == 200
        assert all(tokenizer.decode(prompt.tokens) == prompt.text for prompt in prompts)
    assert not splits["train"] & splits["eval"]
