"""Cut a few layers out of an HF checkpoint: a model of the same widths, small enough to try.

    python tools/cut_layers.py HF OUT --layers 0,1,7,8

Embedding, last norm and output layer come along, the MTP block does not. Bytes are copied as they
are, one tensor at a time; OUT gets its name when all is there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.conversion import check_tensors, copy_extras, raw_bytes
from miles_lite.weights.hf_files import INDEX, HfFiles, make_header

_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", required=True, help="of the source, in their new order")
    parser.add_argument("--shard-gb", type=float, default=4.0)
    options = parser.parse_args()
    try:
        layers = [int(word) for word in options.layers.split(",")]
        num_bytes = cut(options.hf, options.out, layers, int(options.shard_gb * 1e9))
    except ValueError as error:
        raise SystemExit(f"cut_layers: {error}") from None
    print(f"{options.out}: layers {options.layers}, {num_bytes:,} bytes")


def cut(hf: Path, out: Path, layers: Sequence[int], shard_bytes: int) -> int:
    """Bytes of weights written. Raises ValueError."""
    model, files = NemotronH.from_folder(hf), HfFiles(hf)
    if out.exists():
        raise ValueError(f"{out} is there already")
    if not set(layers) <= set(range(model.num_layers)) or len(set(layers)) < len(layers):
        raise ValueError(f"layers {layers}: wanted different ones of 0 to {model.num_layers - 1}")
    check_tensors(files, model)
    renamed = _names(files, layers)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    copy_extras(hf, part)
    _write_config(part, "".join(model.pattern[layer] for layer in layers))
    total = _write_weights(part, files, renamed, shard_bytes)
    part.replace(out)
    return total


def _names(files: HfFiles, layers: Sequence[int]) -> dict[str, str]:
    """New name -> name in the source, in order of the layers."""
    number = {old: new for new, old in enumerate(layers)}
    found: list[tuple[int, str, str]] = []
    for name in files.tensors:
        if name.startswith("mtp."):
            continue
        if not (match := _LAYER.match(name)):
            found.append((-1 if "embeddings" in name else len(layers), name, name))
        elif (old := int(match[1])) in number:
            new = _LAYER.sub(f"backbone.layers.{number[old]}.", name)
            found.append((number[old], new, name))
    return {new: old for _, new, old in sorted(found)}


def _write_config(folder: Path, pattern: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("layers_block_type", "mtp_layers_block_type", "mtp_hybrid_override_pattern"):
        config.pop(key, None)
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    config["num_nextn_predict_layers"] = 0
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(folder: Path, files: HfFiles, names: dict[str, str], shard_bytes: int) -> int:
    shards: list[dict[str, str]] = [{}]
    filled = total = 0
    for new, old in names.items():
        size = files.tensors[old].num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][new] = old
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        stored = {new: files.tensors[old] for new, old in shard.items()}
        with (folder / file).open("wb") as sink:
            sink.write(make_header({new: (s.dtype, s.shape) for new, s in stored.items()}))
            for old in shard.values():
                with files.mapped(old) as tensor:
                    sink.write(raw_bytes(tensor))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


if __name__ == "__main__":
    main()
