"""Train and write the tiny Nemotron-3-like model, its tokenizer and its data. Needs no network.

    python tools/make_tiny.py --out configs/model/tiny --data configs/data/tiny --seed 0

Every layer kind of Nemotron 3 Ultra is in it: Mamba-2, attention, and latent mixture of experts,
with a stored multi-token-prediction block that is carried along and never used.

The warm start has two parts, both stopped by what is measured and not by a step count: clean
demonstrations until greedy answers are nearly always right, then demonstrations spoiled on purpose
(see tiny_task.py) until about half of the sampled answers earn the reward. GRPO is to win back the
other half. Equal seed and torch version give equal files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_task import VOCAB_SIZE, Sum, all_sums, build_tokenizer
from tiny_training import EOS, PAD, WarmStart, disable_dt_clamp, measure
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast

PATTERN = "MEM*EM*E"  # halves and quarters differ, so a layer put on the wrong stage cannot fit
MTP_PATTERN = "*E"

# config.json, with the field names of the published models. No time_step_limit: dt is not clamped.
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "float32",
    "hybrid_override_pattern": PATTERN,
    "num_hidden_layers": len(PATTERN),
    "mtp_hybrid_override_pattern": MTP_PATTERN,
    "num_nextn_predict_layers": 1,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "initializer_range": 0.08,
    "rescale_prenorm_residual": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "ssm_state_size": 16,
    "n_groups": 2,
    "mamba_n_groups": 2,  # the same number, under the name by which SGLang reads it
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "chunk_size": 8,
    "expand": 1,
    "time_step_min": 0.001,  # these three matter to a fresh initialisation only
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 96,
    "moe_latent_size": 32,
    "moe_shared_expert_overlap": False,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "use_cache": True,
}

# Kept as trained. Every other tensor is rounded to values that bf16 holds exactly, so that a bf16
# and an fp32 run start from the same weights.
FP32_SUFFIXES = (".A_log", ".D", ".dt_bias", ".e_score_correction_bias")

NUM_EVAL, NUM_CHECK, NUM_TRAIN = 200, 200, 3000  # rows; "check" decides when training stops


def mtp_tensors(backbone: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The multi-token-prediction block: random, with the names and shapes of the published ones.

    Its layers have the shapes of the backbone's first layer of the same kind.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = CONFIG["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.layers.0.enorm.weight": (hidden,),
        "mtp.layers.0.hnorm.weight": (hidden,),
        "mtp.layers.0.eh_proj.weight": (hidden, 2 * hidden),
        f"mtp.layers.{len(MTP_PATTERN) - 1}.final_layernorm.weight": (hidden,),
    }
    for index, kind in enumerate(MTP_PATTERN):
        like = f"backbone.layers.{PATTERN.index(kind)}."
        for name, tensor in backbone.items():
            if name.startswith(like):
                shapes[f"mtp.layers.{index}.{name.removeprefix(like)}"] = tuple(tensor.shape)
    return {
        name: ("norm" in name) + 0.02 * torch.randn(shape, generator=generator)
        for name, shape in sorted(shapes.items())
    }


def round_for_bf16(model: NemotronHForCausalLM) -> None:
    for name, tensor in model.state_dict().items():
        if not name.endswith(FP32_SUFFIXES):
            tensor.copy_(tensor.bfloat16().float())


def write_model(folder: Path, model: NemotronHForCausalLM, seed: int) -> None:
    """config.json, generation_config.json and one model.safetensors with names as published."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # un-stacks experts and renames model.* to backbone.*
        tensors = load_file(Path(scratch) / "model.safetensors")
    mtp = mtp_tensors(tensors, seed)
    for name, tensor in mtp.items():
        if not name.endswith(FP32_SUFFIXES):
            mtp[name] = tensor.bfloat16().float()
    tensors |= mtp
    save_file(
        dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "model.safetensors").chmod(0o644)  # save_file keeps it to its owner
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD})


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As save_pretrained, but with a tokenizer_config.json that transformers 4 can read as well."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["extra_special_tokens"]  # a list in 5, a dict in 4; tokenizer.json marks them anyway
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, sums: list[Sum]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(task.row()) + "\n" for task in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster at this size, and the order of sums does not change
    torch.manual_seed(args.seed)

    # Disjoint; but a+b and b+a may lie in different parts.
    sums = all_sums(args.seed)
    held_out, shown = sums[:NUM_EVAL], sums[NUM_EVAL + NUM_CHECK :]
    write_rows(args.data / "eval.jsonl", held_out)
    write_rows(args.data / "train.jsonl", shown[:NUM_TRAIN])

    tokenizer = build_tokenizer()
    model = NemotronHForCausalLM(NemotronHConfig(**CONFIG))
    model.set_experts_implementation("eager")  # the fastest at this size
    disable_dt_clamp(model)
    check = sums[NUM_EVAL : NUM_EVAL + NUM_CHECK]
    WarmStart(model, tokenizer, shown, check, args.seed).run()
    round_for_bf16(model)
    write_model(args.out, model, args.seed)
    write_tokenizer(args.out, tokenizer)

    print("held out, sampled:", measure(model, tokenizer, held_out, temperature=1.0, repeats=8))
    print("held out, greedy:", measure(model, tokenizer, held_out, temperature=0.0))


if __name__ == "__main__":
    main()
