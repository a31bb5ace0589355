"""HF checkpoints on disk: read any slice of any tensor, write a checkpoint slice by slice.

Neither direction ever holds more than the slice at hand.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from miles_lite.intact import tree_to_disk
from miles_lite.protocols import Hosted
from miles_lite.weights.conversion import copy_extras
from miles_lite.weights.hf_files import DTYPES, INDEX, SINGLE, Stored, read_header, weight_map


class HfCheckpoint:
    """Tensors of an HF folder by name. Files are checked, memory-mapped and opened on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, Stored]] = {}  # by file
        self.file_of = weight_map(folder) or dict.fromkeys(self._header(SINGLE), SINGLE)
        self._open: dict[str, safe_open] = {}

    def names(self) -> set[str]:
        return set(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along `dim` (0 or 1)."""
        view = self._slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def read_hosted(self, hosted: Hosted) -> torch.Tensor:
        """The tensor that `hosted` describes: its segments, laid end to end."""
        pieces = [self.read(s.tensor, hosted.dim, s.start, s.stop) for s in hosted.segments]
        return torch.cat(pieces, dim=hosted.dim)

    def _header(self, file: str) -> dict[str, Stored]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    def _stored(self, name: str) -> Stored:
        file = self.file_of.get(name, "")
        if not file or name not in self._header(file):
            raise ValueError(f"{self.folder / file}: the checkpoint has no tensor {name!r}")
        return self._header(file)[name]

    def _slice(self, name: str):
        file = self._stored(name).file
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / file} cannot be read ({error})") from None
        return self._open[file].get_slice(name)


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
        values = values.detach().to("cpu", DTYPES[entry["dtype"]]).contiguous()
        raw = memoryview(values.view(torch.uint8).reshape(-1).numpy())  # pyright: ignore
        base = data_start + entry["data_offsets"][0]
        shape, width = entry["shape"], values.element_size()
        fd = os.open(self._part / file, os.O_WRONLY)
        try:
            if dim == 0:
                row_bytes = width * math.prod(shape[1:])
                _write_all(fd, raw, base + start * row_bytes)
            else:
                piece = values.shape[1] * width * math.prod(shape[2:])
                row_bytes = width * math.prod(shape[1:])
                for row in range(shape[0]):
                    at = base + row * row_bytes + start * width * math.prod(shape[2:])
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
