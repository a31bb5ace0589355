"""Write a random Nemotron-H checkpoint of any size, tensor by tensor, to try real shapes.

    python tools/make_model.py OUT                            8 layers of Nano 30B width, 7 GB
    python tools/make_model.py OUT --pattern 'ME*E'           other layers
    python tools/make_model.py OUT --config configs/model/tiny/config.json --set hidden_size=128

Values are small and random; tokenizer and other files beside --config are copied. It holds one
tensor at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.hf_files import INDEX, make_header
from miles_lite.weights.table import HfTensor, hf_tensors, mtp_tensors

NANO_30B: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "hybrid_override_pattern": "MEMEM*MM",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "mamba_n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "intermediate_size": 1856,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, help="a config.json; Nano 30B's widths without")
    parser.add_argument("--pattern", help="layers, such as MEM*E")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="config values")
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = dict(NANO_30B)
    if options.config:
        config = json.loads(options.config.read_text())
    for word in options.set:
        key, _, value = word.partition("=")
        config[key] = json.loads(value)
    if options.pattern:
        config["hybrid_override_pattern"] = options.pattern
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
    if options.out.exists():
        raise SystemExit(f"{options.out} is there already")
    options.out.mkdir(parents=True)
    if options.config:
        for path in options.config.parent.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, options.out / path.name)
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    num_bytes = write(options.out, config, int(options.shard_gb * 1e9), options.seed)
    print(f"{options.out}: {num_bytes:,} bytes")


def write(out: Path, config: Mapping[str, Any], shard_bytes: int, seed: int) -> int:
    """All shards and their index; bytes of weights."""
    model = NemotronH.from_hf(dict(config))
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config["dtype"]]
    tensors = list((hf_tensors(model) | mtp_tensors(model)).values())
    shards = list(_shards(tensors, dtype, shard_bytes))
    rng = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: file for tensor in shard}
        with (out / file).open("wb") as sink:
            sink.write(make_header({t.name: (_dtype(t, dtype), t.shape) for t in shard}))
            for tensor in shard:
                values = torch.empty(tensor.shape, dtype=_dtype(tensor, dtype))
                values.normal_(0, 0.02, generator=rng)
                sink.write(memoryview(values.view(-1).view(torch.uint8).numpy()))  # pyright: ignore
    total = sum(_num_bytes(tensor, dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shards(
    tensors: list[HfTensor], dtype: torch.dtype, shard_bytes: int
) -> Iterator[list[HfTensor]]:
    shard: list[HfTensor] = []
    size = 0
    for tensor in tensors:
        num_bytes = _num_bytes(tensor, dtype)
        if shard and size + num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += num_bytes
    yield shard


def _dtype(tensor: HfTensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if tensor.fp32 else dtype


def _num_bytes(tensor: HfTensor, dtype: torch.dtype) -> int:
    return math.prod(tensor.shape) * _dtype(tensor, dtype).itemsize


if __name__ == "__main__":
    main()
