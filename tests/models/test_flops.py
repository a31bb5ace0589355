"""The count of operations: against what transformers does, and against published models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHConfig, NemotronHForCausalLM

from miles_lite.models.flops import forward_flops, output_flops, train_flops
from miles_lite.models.nemotron_h import NemotronH

TINY = Path(__file__).resolve().parents[2] / "configs/model/tiny/config.json"

ULTRA = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 108,
    "vocab_size": 131072,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 256,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 5120,
    "moe_shared_expert_intermediate_size": 10240,
    "moe_latent_size": 2048,
}
NANO = ULTRA | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "mamba_num_heads": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "moe_latent_size": None,
}
NANO_4B = NANO | {
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "num_hidden_layers": 42,
    "hidden_size": 3136,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "mamba_num_heads": 96,
    "mamba_head_dim": 80,
    "chunk_size": 256,
    "intermediate_size": 12544,
}


def tiny(pattern: str, **changes: Any) -> dict[str, Any]:
    """HF config of the shipped tiny model with other layers."""
    raw = json.loads(TINY.read_text()) | {"hybrid_override_pattern": pattern} | changes
    return raw | {"num_hidden_layers": len(pattern)}


def transformers_flops(raw: dict[str, Any], seq_len: int) -> float:
    """Matrix products and convolutions that transformers makes of one sequence, without the scan.

    It computes the upper half of attention's square, and `conv_kernel - 1` columns of every
    convolution, only to drop them; both are taken off. So is its scan, written for clarity.
    """
    named = {key: v for key, v in raw.items() if key not in ("architectures", "model_type")}
    config: Any = NemotronHConfig(**named)
    config._attn_implementation = "eager"  # other kernels are not counted alike
    config._experts_implementation = "eager"
    model = NemotronHForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_len, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()
    by_op = counts["Global"]
    pattern = raw["hybrid_override_pattern"]
    scanned = sum(
        counts[f"NemotronHForCausalLM.model.layers.{i}.mixer"][torch.ops.aten.bmm]
        for i, kind in enumerate(pattern)
        if kind == "M"
    )
    dropped = raw["conv_kernel"] - 1
    convolved = by_op.get(torch.ops.aten.convolution, 0) * dropped / (seq_len + dropped)
    heads = raw["num_attention_heads"] * raw["head_dim"] * pattern.count("*")
    masked = 2 * 2 * heads * seq_len * (seq_len - 1) // 2
    return sum(by_op.values()) - scanned - convolved - masked


def scan_flops(raw: dict[str, Any], seq_len: int) -> float:
    """Products of a state-space scan in chunks, half of those between positions of one chunk."""
    num_chunks, chunk = seq_len // raw["chunk_size"], raw["chunk_size"]
    x = torch.zeros(num_chunks, raw["mamba_num_heads"], chunk, raw["mamba_head_dim"])
    b = torch.zeros(num_chunks, raw["n_groups"], chunk, raw["ssm_state_size"])
    b_of_head = b.repeat_interleave(raw["mamba_num_heads"] // raw["n_groups"], dim=1)
    with FlopCounterMode(display=False) as square:
        torch.matmul(b, b.mT)  # C with B, of each group
        torch.matmul(torch.zeros(*x.shape[:3], chunk), x)  # their products with x, of each head
    with FlopCounterMode(display=False) as states:
        state = torch.matmul(x.mT, b_of_head)
        torch.matmul(b_of_head, state.mT)
    count = square.get_total_flops() / 2 + states.get_total_flops()
    return raw["hybrid_override_pattern"].count("M") * count


@pytest.mark.parametrize("seq_len", [32, 64])
@pytest.mark.parametrize(
    "raw",
    [
        tiny("M"),
        tiny("M", n_groups=4, mamba_n_groups=4, mamba_head_dim=24, ssm_state_size=8),
        tiny("*", num_attention_heads=8),  # wider than the hidden state
        tiny("E"),
        tiny("E", moe_latent_size=None),
        tiny("-"),
        tiny("MEM*EM*E"),
    ],
    ids=["mamba", "mamba other sizes", "attention", "latent experts", "experts", "mlp", "hybrid"],
)
def test_as_many_as_in_transformers(raw: dict[str, Any], seq_len: int) -> None:
    expected = transformers_flops(raw, seq_len) + scan_flops(raw, seq_len)
    assert forward_flops(NemotronH.from_hf(raw), seq_len) == expected


def test_the_output_layer_is_what_a_vocabulary_costs() -> None:
    model = NemotronH.from_hf(tiny("M*"))
    without = replace(model, vocab_size=0)
    assert output_flops(model, 77) == forward_flops(model, 77) - forward_flops(without, 77)


@pytest.mark.parametrize(
    ("raw", "billions"), [(ULTRA, 56.1), (NANO, 3.6)], ids=["Ultra", "Nano 30B"]
)
def test_twice_the_active_parameters(raw: dict[str, Any], billions: float) -> None:
    """A lone token; the input embedding is active without being multiplied by, and the scan, which
    has no parameters, is half a per cent."""
    model = NemotronH.from_hf(raw)
    active = forward_flops(model, 1) / 2 + model.vocab_size * model.hidden_size
    assert active == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("raw", "gigaflops"),
    [(ULTRA, 112.2), (NANO, 6.94), (NANO_4B, 7.64)],
    ids=["Ultra", "Nano 30B", "Nano 4B"],
)
def test_real_sizes_at_8192_tokens(raw: dict[str, Any], gigaflops: float) -> None:
    """Per token, by a separate calculator that takes all pairs of a chunk and not half of them."""
    per_token = forward_flops(NemotronH.from_hf(raw), 8192) / 8192
    assert per_token == pytest.approx(gigaflops * 1e9, rel=0.01)


def test_only_attention_is_more_than_linear() -> None:
    linear, hybrid = NemotronH.from_hf(tiny("MEM-")), NemotronH.from_hf(tiny("MEM*"))
    assert forward_flops(linear, 3000) == 3 * forward_flops(linear, 1000)
    later = forward_flops(hybrid, 2000) - 2 * forward_flops(hybrid, 1000)
    # each of the second thousand looks at all of the first: scores and values of 4 heads x 16
    assert later == 2 * 2 * 4 * 16 * 1000 * 1000


def test_training_is_two_passes_forward_and_one_back() -> None:
    model = NemotronH.from_hf(tiny("ME*"))
    assert train_flops(model, 77) == 4 * forward_flops(model, 77)
