"""HF checkpoints on disk: read any slice of any tensor, write a checkpoint slice by slice.

Neither direction ever holds more than the slice at hand.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from miles_lite.intact import tree_to_disk
from miles_lite.protocols import Hosted
from miles_lite.weights.conversion import copy_extras
from miles_lite.weights.hf_files import INDEX

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class HfCheckpoint:
    """Tensors of an HF folder by name. Files are memory-mapped and opened on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = _file_of(folder)
        self._open: dict[str, safe_open] = {}

    def names(self) -> set[str]:
        return set(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._slice(name).get_dtype()]

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along `dim` (0 or 1)."""
        view = self._slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def read_hosted(self, hosted: Hosted) -> torch.Tensor:
        """The tensor that `hosted` describes: its segments, laid end to end."""
        pieces = [self.read(s.tensor, hosted.dim, s.start, s.stop) for s in hosted.segments]
        return torch.cat(pieces, dim=hosted.dim)

    def _slice(self, name: str):
        file = self.file_of.get(name)
        if file is None:
            raise ValueError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_slice(name)


def _file_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or the single file."""
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        for file in set(weight_map.values()):
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{index}: names the file {file!r}, which is not in {folder}")
        return weight_map
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: neither {INDEX} nor model.safetensors is there")
    with safe_open(single, framework="pt") as file:
        return {name: single.name for name in file.keys()}  # noqa: SIM118 (not a dict)


class HfWriter:
    """A new HF folder with the files, tensors and extras of a template, filled by many processes.

    `create` lays out files with their final headers; then any process may `write` any slice, at any
    time, in any order: slices are disjoint byte ranges, so no process waits for another and no full
    tensor is ever assembled. `finish` moves the folder into place.
    """

    def __init__(self, folder: Path, template: HfCheckpoint) -> None:
        self.folder = folder
        self._part = folder.with_name(folder.name + ".part")
        self._template = template
        self._headers: dict[str, tuple[int, dict]] = {}  # file -> (data start, header)

    def create(self) -> None:
        """Lay out all files (sparse) and copy everything that is not weights."""
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        source = self._template.folder
        copy_extras(source, self._part)
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, self._part / INDEX)
        for file in set(self._template.file_of.values()):
            head, total = _read_head(source / file)
            with (self._part / file).open("wb") as out:
                out.write(head)
                out.truncate(total)

    def write(self, name: str, dim: int, start: int, values: torch.Tensor) -> None:
        """Put `values` at rows [start, start + n) of tensor `name` along `dim` (0 or 1)."""
        file = self._template.file_of[name]
        data_start, header = self._header(file)
        entry = header[name]
        values = values.detach().to("cpu", _DTYPES[entry["dtype"]]).contiguous()
        raw = memoryview(values.view(torch.uint8).reshape(-1).numpy())  # pyright: ignore
        base = data_start + entry["data_offsets"][0]
        shape, width = entry["shape"], values.element_size()
        fd = os.open(self._part / file, os.O_WRONLY)
        try:
            if dim == 0:
                row_bytes = width * _product(shape[1:])
                _write_all(fd, raw, base + start * row_bytes)
            else:
                piece = values.shape[1] * width * _product(shape[2:])
                row_bytes = width * _product(shape[1:])
                for row in range(shape[0]):
                    at = base + row * row_bytes + start * width * _product(shape[2:])
                    _write_all(fd, raw[row * piece : (row + 1) * piece], at)
        finally:
            os.close(fd)

    def copy_from_template(self, name: str) -> None:
        """Carry a tensor over unchanged."""
        view = self._template.read(name, 0, 0, self._template.shape(name)[0])
        self.write(name, 0, 0, view)

    def finish(self) -> None:
        """Replace the target folder by the finished one."""
        tree_to_disk(self._part)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._part.rename(self.folder)

    def _header(self, file: str) -> tuple[int, dict]:
        if file not in self._headers:
            head, _ = _read_head(self._part / file)
            self._headers[file] = (len(head), json.loads(head[8:]))
        return self._headers[file]


def _write_all(fd: int, raw: memoryview, at: int) -> None:
    """pwrite stops at 2 GiB, and where a disk is full, without a word."""
    while raw:
        written = os.pwrite(fd, raw, at)
        raw, at = raw[written:], at + written


def _read_head(path: Path) -> tuple[bytes, int]:
    """The safetensors header with its length prefix, and the file's total size."""
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix)
        return prefix + file.read(length), path.stat().st_size


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def missing_and_unknown(
    checkpoint: HfCheckpoint, expected: Mapping[str, object]
) -> tuple[list[str], list[str]]:
    """Tensors expected but not there, and there but not expected."""
    names = checkpoint.names()
    return sorted(set(expected) - names), sorted(names - set(expected))
