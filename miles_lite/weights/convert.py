"""HF checkpoints to Megatron torch_dist and back, file by file, by many processes and hosts.

A unit is one output file: it is written beside its name, renamed, and only then noted in
OUT/.progress/, so a rank that is killed loses the file it was at. No process holds more than a
tensor; no model is made.

    OUT/release/__0_0.distcp ... .metadata common.pt metadata.json      weights only
    OUT/hf/                       everything of the HF folder that is not weights
    OUT/manifest.json             content hash of every HF tensor
    OUT/latest_checkpointed_iteration.txt       written last: "release"
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.hf_files import INDEX, HfFiles, read_header
from miles_lite.weights.table import hf_tensors, mtp_tensors
from miles_lite.weights.torch_dist import (
    METADATA,
    DistCheckpoint,
    Piece,
    Written,
    extra_states,
    metadata_of,
    pieces,
    write_chunk,
    write_object,
)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what Megatron calls a checkpoint without iterations
MANIFEST = "manifest.json"
PROGRESS = ".progress"
MIN_UNIT, MAX_UNIT = 64 << 20, 2 << 30  # bytes of one output file
FIXED_BYTES = 1 << 30  # of a worker: python, torch, and room to breathe


@dataclass(frozen=True, slots=True)
class Unit:
    """One output file and what goes into it."""

    file: str
    tensors: tuple[str, ...]  # of HF
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one unit."""

    file: str
    num_bytes: int
    peak_rss: int  # bytes, of the process that did it


@functools.cache
def _opened(hf: Path) -> tuple[NemotronH, HfFiles]:
    """Once a process: a large model has tens of thousands of tensors."""
    return NemotronH.from_folder(hf), HfFiles(hf)


def check_tensors(files: HfFiles, model: NemotronH) -> None:
    """Raise ValueError unless the folder holds exactly the model's tensors, in their shapes."""
    wanted = hf_tensors(model) | mtp_tensors(model)
    missing, unknown = (
        sorted(set(wanted) - set(files.tensors)),
        sorted(set(files.tensors) - set(wanted)),
    )
    if missing or unknown:
        told = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(
            f"{files.folder}: tensors and the layer pattern {model.pattern!r} (MTP "
            f"{model.mtp_pattern!r}) disagree; {'; '.join(told)}"
        )
    for name, tensor in wanted.items():
        if files.tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{files.folder}: tensor {name!r} has shape {files.tensors[name].shape}, "
                f"config.json makes it {tensor.shape}"
            )


def check_resources(out: Path, to_write: int, largest: int, workers: int) -> str:
    """What the conversion needs, in a sentence; ValueError if the machine does not have it."""
    per_worker = FIXED_BYTES + 2 * largest
    place = next(path for path in (out, *out.parents) if path.exists())
    disk, memory = shutil.disk_usage(place).free, psutil.virtual_memory().available
    if to_write > disk:
        raise ValueError(
            f"{out} needs {_gb(to_write)} more, {_gb(disk)} are free there: make room, then the "
            "same command goes on"
        )
    if workers * per_worker > memory:
        raise ValueError(
            f"{workers} workers need up to {_gb(per_worker)} each, {_gb(memory)} of memory are "
            f"free: take --workers {max(1, memory // per_worker)}"
        )
    return (
        f"{_gb(to_write)} to write ({_gb(disk)} free), up to {_gb(per_worker)} of memory for each "
        f"of {workers} workers"
    )


def share(units: Sequence[Unit], rank: int, num_ranks: int) -> list[Unit]:
    """The units of one rank: largest first, each to whoever has least."""
    loads = [0] * num_ranks
    mine = []
    for unit in sorted(units, key=lambda unit: (-unit.num_bytes, unit.file)):
        lightest = loads.index(min(loads))
        loads[lightest] += unit.num_bytes
        if lightest == rank:
            mine.append(unit)
    return mine


def done(out: Path, unit: Unit) -> bool:
    """Whether an earlier attempt finished this file."""
    return (out / PROGRESS / f"{unit.file}.json").is_file()


# ------------------------------------------------------------------ HF to torch_dist


class ToDist:
    """The conversion of one HF folder. Pickles small: workers open what they need."""

    def __init__(self, hf: Path, out: Path, dtype: torch.dtype | None) -> None:
        """dtype: of all weights but those that stay fp32; None keeps each as it is."""
        self.hf, self.out, self.dtype = hf, out, dtype

    def prepare(self) -> tuple[list[Unit], int]:
        """(units, bytes of the largest tensor), everything checked. Raises ValueError."""
        model, files = NemotronH.from_folder(self.hf), HfFiles(self.hf)
        check_tensors(files, model)
        sizes = {name: stored.num_bytes for name, stored in files.tensors.items()}
        total = sum(sizes.values())
        _claim(self.out, {"hf": str(self.hf.resolve()), "bytes": total, "dtype": str(self.dtype)})
        (self.out / RELEASE).mkdir(exist_ok=True)
        limit = min(MAX_UNIT, max(MIN_UNIT, total // 256))
        units: list[Unit] = []
        names: list[str] = []
        num_bytes = 0
        for group, _ in [*pieces(model), ((), ())]:
            size = sum(sizes[name] for name in group)
            if names and (not group or num_bytes + size > limit):
                units.append(Unit(f"__{len(units)}_0.distcp", tuple(names), num_bytes))
                names, num_bytes = [], 0
            names += group
            num_bytes += size
        return units, max(sizes.values())

    def convert(self, unit: Unit) -> Report:
        """Write one file."""
        model, files = _opened(self.hf)
        keep = {n for n, t in (hf_tensors(model) | mtp_tensors(model)).items() if t.fp32}
        groups = [group for group in pieces(model) if set(group[0]) <= set(unit.tensors)]
        written: list[Written] = []
        hashes: dict[str, str] = {}
        with _appearing(self.out / RELEASE / unit.file) as out:
            for names, chunks in groups:
                for name in names:
                    with files.mapped(name) as tensor:
                        hashes[name] = content_hash(tensor)
                for piece in chunks:
                    tensor = self._assemble(files, piece, keep)
                    written.append(write_chunk(out, piece, tensor, unit.file))
                    del tensor
        note = {"written": [asdict(one) for one in written], "hashes": hashes}
        _note(self.out, unit, note)
        return Report(unit.file, unit.num_bytes, _peak_rss())

    def _assemble(self, files: HfFiles, piece: Piece, keep: set[str]) -> torch.Tensor:
        parts = []
        for name, start, stop in piece.sources:
            with files.mapped(name) as tensor:
                rows = tensor[start:stop] if stop - start < tensor.shape[0] else tensor
                if self.dtype and name not in keep:
                    rows = rows.to(self.dtype)
                # torch.save writes whole storages: a slice must have one of its own
                partial = rows.numel() * rows.element_size() < rows.untyped_storage().nbytes()
                parts.append(rows.clone() if partial else rows)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(piece.shape)

    def finish(self, units: Sequence[Unit]) -> None:
        """Once all units are done, by one rank: metadata, manifest, tracker."""
        model = NemotronH.from_folder(self.hf)
        notes = [_noted(self.out, unit) for unit in units]
        written = [_written(one) for note in notes for one in note["written"]]
        folder = self.out / RELEASE
        extra = "__extra_0.distcp"
        with (folder / extra).open("wb") as out:
            written += [write_object(out, key, extra) for key in extra_states(model)]
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
        (folder / METADATA).write_bytes(pickle.dumps(metadata_of(written)))
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backends | versions))
        copy_extras(self.hf, self.out / "hf")
        hashes = {name: value for note in notes for name, value in note["hashes"].items()}
        _replace(self.out / MANIFEST, json.dumps({"tensors": hashes}, indent=1))
        _replace(self.out / TRACKER, RELEASE + "\n")


# ------------------------------------------------------------------ torch_dist to HF


class ToHf:
    """The way back, into the files, names, order and dtypes of a template."""

    def __init__(self, dist: Path, template: Path, out: Path) -> None:
        self.dist, self.template, self.out = dist, template, out

    def prepare(self) -> tuple[list[Unit], int]:
        """As ToDist.prepare; the units are the template's files."""
        model, files = NemotronH.from_folder(self.template), HfFiles(self.template)
        check_tensors(files, model)
        dist = DistCheckpoint(iteration_folder(self.dist))
        has_mtp = any(name in dist.shapes for name in mtp_tensors(model))
        for _, chunks in pieces(model):
            for piece in chunks:
                if not has_mtp and piece.key.startswith("mtp."):
                    continue
                if dist.shapes.get(piece.key) != piece.global_shape:
                    raise ValueError(
                        f"{dist.folder}: key {piece.key!r} has shape {dist.shapes.get(piece.key)}, "
                        f"the model of {self.template} wants {piece.global_shape}"
                    )
        _claim(self.out, {"dist": str(self.dist.resolve()), "hf": str(self.template.resolve())})
        by_file: dict[str, list[str]] = {}
        for name, stored in files.tensors.items():
            by_file.setdefault(stored.file, []).append(name)
        units = [
            Unit(file, tuple(names), sum(files.tensors[name].num_bytes for name in names))
            for file, names in sorted(by_file.items())
        ]
        return units, max(stored.num_bytes for stored in files.tensors.values())

    def convert(self, unit: Unit) -> Report:
        """Write one file."""
        source, (_, files) = _source(self.dist, self.template), _opened(self.template)
        stored = read_header(self.template / unit.file)
        begin = min((one.begin for one in stored.values()), default=0)
        hashes: dict[str, str] = {}
        with (
            (self.template / unit.file).open("rb") as template,
            _appearing(self.out / unit.file) as out,
        ):
            out.write(template.read(begin))
            for name, one in sorted(stored.items(), key=lambda item: item[1].begin):
                out.seek(one.begin)
                with contextlib.ExitStack() as stack:
                    if source.has(name):
                        tensor = source.read(name).to(one.dtype).contiguous()
                    else:  # of a run, which carries the MTP block through untrained
                        tensor = stack.enter_context(files.mapped(name))
                    hashes[name] = content_hash(tensor)
                    out.write(_bytes(tensor))
                    del tensor
        _note(self.out, unit, {"hashes": hashes})
        return Report(unit.file, unit.num_bytes, _peak_rss())

    def finish(self, units: Sequence[Unit]) -> None:
        copy_extras(self.template, self.out)
        if (self.template / INDEX).is_file():
            shutil.copyfile(self.template / INDEX, self.out / INDEX)
        notes = [_noted(self.out, unit) for unit in units]
        hashes = {name: value for note in notes for name, value in note["hashes"].items()}
        _replace(self.out / MANIFEST, json.dumps({"tensors": hashes}, indent=1))


class DistSource:
    """HF tensors out of a torch_dist checkpoint, one at a time."""

    def __init__(self, folder: Path, model: NemotronH) -> None:
        self._dist = DistCheckpoint(folder)
        self._shapes = {n: t.shape for n, t in (hf_tensors(model) | mtp_tensors(model)).items()}
        # HF tensor -> (piece, first row within the piece, first and last row of the tensor)
        self._parts: dict[str, list[tuple[Piece, int, int, int]]] = {}
        for _, chunks in pieces(model):
            for piece in chunks:
                offset = 0
                for name, start, stop in piece.sources:
                    self._parts.setdefault(name, []).append((piece, offset, start, stop))
                    offset += stop - start

    def has(self, name: str) -> bool:
        return all(piece.key in self._dist.shapes for piece, *_ in self._parts[name])

    def read(self, name: str) -> torch.Tensor:
        """In the shape that HF knows. Raises ValueError for what is missing or corrupt."""
        shape = self._shapes[name]
        parts = []
        for piece, offset, start, stop in sorted(self._parts[name], key=lambda part: part[2]):
            if len(piece.shape) > len(shape):  # one expert of a stack
                parts.append(self._dist.read(piece.key, piece.offsets, piece.shape)[0])
                continue
            offsets = (piece.offsets[0] + offset, *piece.offsets[1:])
            parts.append(self._dist.read(piece.key, offsets, (stop - start, *piece.shape[1:])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def _source(dist: Path, hf: Path) -> DistSource:
    return DistSource(iteration_folder(dist), NemotronH.from_folder(hf))


def verify(hf: Path, dist: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each HF tensor whose bits are those of the torch_dist checkpoint; a dtype
    that differs is converted to HF's first. Raises ValueError naming the first that differs."""
    model, files = NemotronH.from_folder(hf), HfFiles(hf)
    check_tensors(files, model)
    source = DistSource(iteration_folder(dist), model)
    for name, stored in files.tensors.items():
        theirs = source.read(name).to(stored.dtype).contiguous()
        with files.mapped(name) as ours:
            if content_hash(ours) != content_hash(theirs):
                raise ValueError(f"tensor {name!r} differs between {hf / stored.file} and {dist}")
        yield name, stored.num_bytes


# ------------------------------------------------------------------ what both share


def iteration_folder(dist: Path) -> Path:
    """The folder that holds `.metadata`: `dist` itself, or what its tracker names."""
    if (dist / METADATA).is_file():
        return dist
    tracker = dist / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{dist} is no torch_dist checkpoint: neither {METADATA} nor {TRACKER}")
    name = tracker.read_text().strip()
    return dist / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def copy_extras(source: Path, target: Path) -> None:
    """Config, tokenizer, template and whatever else is no weights. The layer pattern is written as
    a string too: SGLang reads no other spelling that transformers may have written."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, MANIFEST):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    model = NemotronH.from_folder(source)
    if not config.get("hybrid_override_pattern"):
        config["hybrid_override_pattern"] = model.pattern
        if model.mtp_pattern:
            config["mtp_hybrid_override_pattern"] = model.mtp_pattern
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def content_hash(tensor: torch.Tensor) -> str:
    """Of the bytes of a contiguous tensor."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()  # the fastest where the CPU knows it


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only once it is complete; nothing is left of a failed one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as out:
            yield out
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _claim(out: Path, purpose: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything else."""
    note = out / PROGRESS / "purpose.json"
    if note.is_file():
        if (before := json.loads(note.read_text())) != purpose:
            raise ValueError(f"{out} holds another conversion, of {before}: choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by this conversion")
    (out / PROGRESS).mkdir(parents=True, exist_ok=True)
    _replace(note, json.dumps(purpose))


def _note(out: Path, unit: Unit, value: Mapping[str, Any]) -> None:
    _replace(out / PROGRESS / f"{unit.file}.json", json.dumps(value))


def _noted(out: Path, unit: Unit) -> dict[str, Any]:
    return json.loads((out / PROGRESS / f"{unit.file}.json").read_text())


def _written(one: Mapping[str, Any]) -> Written:
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
    return Written(**made)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    part.write_text(text)
    part.replace(path)


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
