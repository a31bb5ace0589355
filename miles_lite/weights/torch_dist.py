"""Megatron's `torch_dist` format without Megatron: what keys a model has, reading and writing them.

A folder holds files of chunks, each chunk the `torch.save` of one tensor, and `.metadata`, a pickle
of torch.distributed.checkpoint that tells which part of which key lies where. Keys do not depend on
the layout that wrote or reads them. They are those of a GPU run, where Transformer Engine fuses a
norm into the linear layer after it; experts of a layer are stacked.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.unpickle import unpickle
from miles_lite.weights.conversion import METADATA
from miles_lite.weights.table import Row, mtp_tensors, rows

_BLOCKS = {5: ("z", "x", "B", "C", "dt"), 3: ("x", "B", "C")}  # of in_proj and conv1d
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk: a key's part at `offsets`, made of segments of HF tensors end to end."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int, int], ...]  # HF tensor, first and last row along dimension 0


def pieces(model: NemotronH) -> Iterator[tuple[tuple[str, ...], tuple[Piece, ...]]]:
    """(HF tensors, chunks made of exactly those), MTP included, which keeps its HF names: stock
    megatron-core 0.16 has no place for it and ignores keys it does not ask for."""
    for row in rows(model):
        yield tuple(t.name for t in row.hf), tuple(_of_row(row, model))
    for name, tensor in mtp_tensors(model).items():
        whole = ((name, 0, tensor.shape[0]),)
        origin = (0,) * len(tensor.shape)
        yield (name,), (Piece(name, tensor.shape, origin, tensor.shape, whole),)


def _of_row(row: Row, model: NemotronH) -> Iterator[Piece]:
    key = _key(row, model)
    first = row.hf[0]
    if row.expert >= 0:
        shape = (1, *first.shape)
        offsets = (row.expert, *(0 for _ in first.shape))
        sources = ((first.name, 0, first.shape[0]),)
        yield Piece(key, (model.num_experts, *first.shape), offsets, shape, sources)
        return
    names = [f".{block}" for block in _BLOCKS[len(row.parts)]] if len(row.parts) > 1 else [""]
    for suffix, part in zip(names, row.parts, strict=True):
        # of a plain copy the one segment is the whole tensor, whichever dimension is cut
        plain = len(row.hf) == 1 and len(row.parts) == 1
        sources = tuple((s.tensor, s.start, s.stop) for s in part)
        size = sum(map(len, part))
        shape = first.shape if plain else (size, *first.shape[1:])
        if plain:
            sources = ((first.name, 0, first.shape[0]),)
        yield Piece(key + suffix, shape, (0,) * len(shape), shape, sources)


def _key(row: Row, model: NemotronH) -> str:
    """What a GPU run of megatron calls a row in a checkpoint."""
    key = _EXPERT.sub(".experts.experts.", row.megatron)
    layer = f"decoder.layers.{row.layer}."
    fused = {
        layer + "norm.weight": "mixer.in_proj.layer_norm_weight",
        layer + "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    }
    if model.pattern[row.layer : row.layer + 1] == "-":
        fused[layer + "pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    return layer + fused[key] if key in fused else key


def extra_states(model: NemotronH) -> Iterator[str]:
    """Keys of the (empty) state that linear layers of either spec ask for besides their weights."""
    for layer, kind in enumerate(model.pattern):
        prefix = f"decoder.layers.{layer}."
        if kind == "M":
            names = ["mixer.in_proj", "mixer.out_proj"]
        elif kind == "*":
            names = [f"self_attention.{n}" for n in ("linear_qkv", "linear_proj", "core_attention")]
        elif kind == "-":
            names = ["mlp.linear_fc1", "mlp.linear_fc2"]
        else:
            names = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
            names += ["mlp.fc1_latent_proj", "mlp.fc2_latent_proj"] if model.latent_size else []
            for linear in ("linear_fc1", "linear_fc2"):
                for expert in range(model.num_experts):
                    shard = f"shard_{expert}_{model.num_experts}"
                    yield f"{prefix}mlp.experts.experts.{linear}._extra_state/{shard}"
        yield from (f"{prefix}{name}._extra_state/shard_0_1" for name in names)
    yield "output_layer._extra_state/shard_0_1"


# ------------------------------------------------------------------ writing


@dataclass(frozen=True, slots=True)
class Written:
    """Where a chunk, or an object if it has no shape, came to lie."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int


def write_chunk(out: IO[bytes], piece: Piece, tensor: torch.Tensor, file: str) -> Written:
    """Append one chunk to an open file."""
    begin = out.tell()
    # torch.load does not check them, and the manifest has hashes
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, which torch hides on closing
            raise error.__context__ from None
        raise
    return Written(
        *(piece.key, piece.offsets, piece.shape, piece.global_shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        file=file,
        offset=begin,
        length=out.tell() - begin,
    )


def write_object(out: IO[bytes], key: str, file: str) -> Written:
    """Append an empty state, in the list that megatron keeps objects in."""
    begin, raw = out.tell(), io.BytesIO()
    torch.save([None], raw)
    out.write(raw.getvalue())
    return Written(key, (), (), (), "", file, begin, out.tell() - begin)


def metadata_of(written: Sequence[Written]) -> Metadata:
    """What `.metadata` says of all chunks."""
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for one in written:
        place = _StorageInfo(one.file, one.offset, one.length)
        if not one.dtype:
            state[one.key] = BytesStorageMetadata()
            storage[MetadataIndex(one.key)] = place
            continue
        if one.key not in state:
            dtype = getattr(torch, one.dtype)
            state[one.key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(one.global_shape), []
            )
        chunks = state[one.key].chunks
        index = MetadataIndex(one.key, torch.Size(one.offsets), len(chunks))
        chunks.append(ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.shape)))
        storage[index] = place
    return Metadata(state_dict_metadata=state, planner_data={}, storage_data=storage)


# ------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class _Chunk:
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: _StorageInfo


# All that a `.metadata` of torch, of megatron or of ours names; each only holds what it is given.
_HOLDERS = (
    *(Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex),
    *(TensorProperties, dcp._MEM_FORMAT_ENCODING, dcp.StorageMeta, _StorageInfo, _StoragePrefix),
    *(planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData),
    *(planner.BytesIOWriteData, torch.Size, torch.serialization._get_layout),
)
_NAMES = frozenset(
    {f"{each.__module__}.{each.__qualname__}" for each in _HOLDERS}
    | {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
)


class DistCheckpoint:
    """Keys of a torch_dist folder, whoever wrote it at whatever layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / METADATA
        try:
            metadata = unpickle(path.read_bytes(), _NAMES, "a checkpoint")
            self.shapes, self._chunks = _index(metadata)
        except FileNotFoundError:
            raise ValueError(
                f"{folder} is no torch_dist checkpoint: it has no {METADATA}"
            ) from None
        except Exception as error:  # whatever a broken pickle raises
            raise ValueError(f"{path} cannot be read ({error!r})") from None
        self._last: tuple[Any, torch.Tensor] | None = None  # a fused chunk is read part by part

    def read(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A part of a key, put together from the chunks that overlap it."""
        if key not in self.shapes:
            raise ValueError(f"{self.folder} has no key {key!r}")
        out: torch.Tensor | None = None
        filled = 0
        for held in self._chunks[key]:
            low = [max(a, b) for a, b in zip(offsets, held.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, shape, held.offsets, held.shape, strict=True)
            ]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            chunk = self._load(key, held.place, held.shape)
            if held.offsets == tuple(offsets) and held.shape == tuple(shape):
                return chunk
            if out is None:
                out = torch.empty(tuple(shape), dtype=chunk.dtype)
            target = out[_range(low, high, offsets)]
            target.copy_(chunk[_range(low, high, held.offsets)])
            filled += target.numel()
        if out is None or filled < math.prod(shape):
            raise ValueError(f"{self.folder}: key {key!r} lacks chunks for {tuple(offsets)}")
        return out

    def _load(self, key: str, place: _StorageInfo, shape: tuple[int, ...]) -> torch.Tensor:
        if self._last and self._last[0] == place:
            return self._last[1]
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                if (size := file.seek(0, io.SEEK_END)) < place.offset + place.length:
                    raise ValueError(
                        f"{path} is truncated at offset {size:,}: key {key!r} ends at "
                        f"{place.offset + place.length:,}"
                    )
                tensor = _loaded(file, place, f"{path}: the chunk of key {key!r}")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: key {key!r} at offset {place.offset:,} is not of {shape}")
        self._last = (place, tensor)
        return tensor


def _loaded(file: IO[bytes], place: _StorageInfo, what: str) -> Any:
    """Straight from the file into the memory of the tensor."""
    window: Any = _create_file_view(cast(io.IOBase, file), place.offset, place.length)
    try:
        return torch.load(window, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken archive raises
        raise ValueError(f"{what} at offset {place.offset:,} is corrupt ({error})") from None


def _index(metadata: Metadata) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Chunk]]]:
    """Shapes and chunks of all keys that are tensors."""
    entries = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in entries.items()
        for chunk in entry.chunks
    }
    storage: Mapping[MetadataIndex, Any] = metadata.storage_data or {}
    for file in {place.relative_path for place in storage.values()}:
        if Path(file).name != file:
            raise ValueError(f"it places chunks in {file!r}, which is not a file beside it")
    chunks: dict[str, list[_Chunk]] = defaultdict(list)
    for index, place in storage.items():
        offsets = tuple(index.offset or ())
        if (shape := sizes.get((index.fqn, offsets))) is not None:
            chunks[index.fqn].append(_Chunk(offsets, shape, place))
    return {key: tuple(entry.size) for key, entry in entries.items()}, chunks


def _range(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
