"""Safetensors files of an HF folder as byte ranges, checked before a byte of weights is read."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles_lite.untrusted import parse_object, short

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_BROKEN = (LookupError, TypeError, AttributeError)
_MAX_HEADER = 100 << 20  # what safetensors itself allows
_MAX_NAME = 500  # characters of a tensor's name, which many messages quote


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class HfFiles:
    """All tensors of a folder by name. Raises ValueError that names file and offset of what is
    truncated, corrupt or missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_map(folder)
        self.tensors: dict[str, Stored] = {}
        known = set(files.values()) if files else {SINGLE}
        if strays := sorted({path.name for path in folder.glob("*.safetensors")} - known):
            raise ValueError(
                f"{folder / strays[0]} is not named by {INDEX if files else SINGLE} ({len(strays)} "
                "such files): move it away, or mend the index"
            )
        for file in sorted(known):
            self.tensors |= {
                name: stored
                for name, stored in read_header(folder / file).items()
                if files.get(name, file) == file
            }
        if missing := sorted(set(files) - set(self.tensors)):
            raise ValueError(
                f"{folder / INDEX} names {short(missing[0])} in {files[missing[0]]}, which does "
                f"not hold it ({len(missing)} such tensors)"
            )

    @contextmanager
    def mapped(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in the file's own pages; gone when the context ends."""
        stored = self.tensors[name]
        start = stored.begin - stored.begin % mmap.ALLOCATIONGRANULARITY
        if not stored.num_bytes:
            yield torch.empty(stored.shape, dtype=stored.dtype)
            return
        with (self.folder / stored.file).open("rb") as file:
            # a private mapping, so that torch may think it writable
            pages = mmap.mmap(
                file.fileno(), stored.end - start, access=mmap.ACCESS_COPY, offset=start
            )
        count = math.prod(stored.shape)
        tensor = torch.frombuffer(
            pages, dtype=stored.dtype, count=count, offset=stored.begin - start
        )
        yield tensor.view(stored.shape)


def make_header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """What a file begins with whose tensors follow one after the other, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header of {length:,} bytes does "
                f"not fit into {size:,} bytes at offset 8"
            )
        header = parse_object(file.read(length), f"{path}: the header at offset 8 is corrupt")
        header.pop("__metadata__", None)
        try:
            found = {
                name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()
            }
        except _BROKEN as error:
            raise ValueError(f"{path}: the header at offset 8 is corrupt ({error!r})") from None
    at = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != at:
            raise ValueError(
                f"{path}: the header at offset 8 is corrupt: tensor {name!r} begins at "
                f"{stored.begin:,}, what is before it ends at {at:,}"
            )
        at = stored.end
    if at != size:
        raise ValueError(f"{path} has {size - at:,} bytes after its last tensor, at offset {at:,}")
    return found


def _stored(path: Path, name: str, entry: Any, data: int, size: int) -> Stored:
    if len(name) > _MAX_NAME:
        raise ValueError(f"{path}: a tensor's name of {len(name):,} characters: {short(name)}")
    begin, end = (data + entry["data_offsets"][side] for side in (0, 1))
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {short(entry['dtype'])}, only "
            f"{', '.join(DTYPES)} can be converted"
        )
    stored = Stored(path.name, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
    if any(type(number) is not int for number in (*stored.shape, begin, end)):
        raise TypeError(f"tensor {name!r} has the shape {short(stored.shape)}, begins at {begin}")
    wanted = math.prod(stored.shape) * stored.dtype.itemsize
    if min(stored.shape, default=0) < 0 or begin < data or stored.num_bytes != wanted:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {short(stored.shape)} lies in bytes {begin:,} to "
            f"{end:,}, which are not its {wanted:,}"
        )
    if end > size:
        raise ValueError(f"{path} is truncated at offset {size:,}: tensor {name!r} ends at {end:,}")
    return stored


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file by the index; {} for a folder of one file. All of them lie in the folder, or
    are links there, as the Hugging Face cache has them."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder}: neither {INDEX} nor {SINGLE} is there")
        return {}
    try:
        files: dict[str, str] = dict(parse_object(index.read_bytes(), str(index))["weight_map"])
        names = sorted(set(files.values()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{index} cannot be read ({error!r})") from None
    here = {path.name for path in folder.iterdir() if path.is_file()}
    for file in names:
        if file not in here:
            raise ValueError(f"{index} names the file {short(file)}, which is not in {folder}")
    if not files:
        raise ValueError(f"{index} names no tensor")
    return files
