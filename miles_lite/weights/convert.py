"""HF checkpoints to Megatron torch_dist and back, file by file, by many processes and hosts.

A unit is one output file: it is written beside its name, fsynced, renamed, and only then noted in
OUT/.progress/, so a rank that is killed loses the file it was at. No process holds more than a
tensor; no model is made.

    OUT/release/__0_0.distcp ... .metadata common.pt metadata.json      weights only
    OUT/hf/                       everything of the HF folder that is not weights
    OUT/manifest.json             content hashes of every tensor, here and there, and of small files
    OUT/latest_checkpointed_iteration.txt       written last: "release"
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from miles_lite.intact import HASH, file_digest, tree_to_disk
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.conversion import (
    MANIFEST,
    MAX_UNIT,
    METADATA,
    MIN_UNIT,
    RELEASE,
    TRACKER,
    Report,
    Unit,
    appearing,
    check_hash,
    check_tensors,
    claim,
    content_hash,
    copy_extras,
    fingerprint,
    fingerprint_hf,
    iteration_folder,
    noted,
    peak_rss,
    raw_bytes,
    read_manifest,
    replace_text,
    write_manifest,
)
from miles_lite.weights.hf_files import INDEX, HfFiles, read_header
from miles_lite.weights.table import hf_tensors, mtp_tensors
from miles_lite.weights.torch_dist import (
    DistCheckpoint,
    Piece,
    Written,
    extra_states,
    metadata_of,
    pieces,
    write_chunk,
    write_object,
)

Opened = tuple[NemotronH, HfFiles, dict[str, dict[str, Any]]]  # with the manifest, if it has one
Group = tuple[tuple[str, ...], tuple[Piece, ...]]  # HF tensors, and the chunks made of them


@functools.cache
def _opened(hf: Path) -> Opened:
    """Once a process: a large model has tens of thousands of tensors."""
    return NemotronH.from_folder(hf), HfFiles(hf), read_manifest(hf)


@functools.cache
def _groups(hf: Path) -> dict[str, Group]:
    """By the first tensor."""
    return {group[0][0]: group for group in pieces(_opened(hf)[0])}


# ------------------------------------------------------------------ HF to torch_dist


class ToDist:
    """The conversion of one HF folder. Pickles small: workers open what they need."""

    last = TRACKER  # written when all else is

    def __init__(self, hf: Path, out: Path, dtype: torch.dtype | None) -> None:
        """dtype: of all weights but those that stay fp32; None keeps each as it is."""
        self.hf, self.out, self.dtype = hf, out, dtype

    def prepare(self) -> tuple[list[Unit], int]:
        """(units, bytes of the largest tensor), everything checked. Raises ValueError."""
        model, files = NemotronH.from_folder(self.hf), HfFiles(self.hf)
        check_tensors(files, model)
        kept = self._kept(model)
        sizes = {
            name: stored.num_bytes
            if self.dtype is None or name in kept
            else math.prod(stored.shape) * self.dtype.itemsize
            for name, stored in files.tensors.items()
        }
        total = sum(sizes.values())
        purpose = {"hf": str(self.hf.resolve()), "dtype": str(self.dtype), "hash": HASH}
        claim(self.out, purpose | {"source": fingerprint_hf(files)})
        (self.out / RELEASE).mkdir(exist_ok=True)
        limit = min(MAX_UNIT, max(MIN_UNIT, total // 256))
        units: list[Unit] = []
        names: list[str] = []
        num_bytes = 0
        for group, _ in [*pieces(model), ((), ())]:
            size = sum(sizes[name] for name in group)
            if names and (not group or num_bytes + size > limit):
                file = f"{RELEASE}/__{len(units)}_0.distcp"
                units.append(Unit(file, tuple(names), num_bytes))
                names, num_bytes = [], 0
            names += group
            num_bytes += size
        return units, max(*sizes.values(), *(one.num_bytes for one in files.tensors.values()))

    def convert(self, unit: Unit) -> Report:
        """Write one file, which is then to be settled."""
        model, files, manifest = _opened(self.hf)
        kept = self._kept(model)
        by_first = _groups(self.hf)
        groups = [by_first[name] for name in unit.tensors if name in by_first]
        written: list[Written] = []
        hashes: dict[str, dict[str, str]] = {}
        with appearing(self.out / unit.file) as out:
            for names, chunks in groups:
                for name in names:
                    with files.mapped(name) as tensor:
                        found = content_hash(tensor)
                        check_hash(manifest, "hf", name, found, self.hf)
                        cast = self._cast(name, tensor, kept)
                        rounded = found if cast is tensor else content_hash(cast)
                    hashes[name] = {"hf": found, "dist": rounded}
                    del tensor, cast
                for piece in chunks:
                    tensor = self._assemble(files, piece, kept)
                    written.append(write_chunk(out, piece, tensor, Path(unit.file).name))
                    del tensor
        told = {"written": [asdict(one) for one in written], "hashes": hashes}
        return Report(unit.file, unit.num_bytes, peak_rss(), told)

    @staticmethod
    def _kept(model: NemotronH) -> set[str]:
        """Tensors that have the same dtype on both sides."""
        return {n for n, t in (hf_tensors(model) | mtp_tensors(model)).items() if t.fp32}

    def _cast(self, name: str, rows: torch.Tensor, kept: set[str]) -> torch.Tensor:
        return rows if self.dtype is None or name in kept else rows.to(self.dtype)

    def _assemble(self, files: HfFiles, piece: Piece, kept: set[str]) -> torch.Tensor:
        parts = []
        for name, start, stop in piece.sources:
            with files.mapped(name) as tensor:
                rows = tensor[start:stop] if stop - start < tensor.shape[0] else tensor
                rows = self._cast(name, rows, kept)
                # torch.save writes whole storages: a slice must have one of its own
                partial = rows.numel() * rows.element_size() < rows.untyped_storage().nbytes()
                parts.append(rows.clone() if partial else rows)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(piece.shape)

    def finish(self, units: Sequence[Unit]) -> None:
        """Once all units are done, by one rank: metadata, manifest, tracker."""
        model = NemotronH.from_folder(self.hf)
        written = [_written(one) for unit in units for one in noted(self.out, unit)["written"]]
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
        small = (extra, "common.pt", METADATA, "metadata.json")
        tree_to_disk(folder)
        tree_to_disk(self.out / "hf")
        write_manifest(self.out, units, {name: file_digest(folder / name) for name in small})
        replace_text(self.out / TRACKER, RELEASE + "\n")


# ------------------------------------------------------------------ torch_dist to HF


class ToHf:
    """The way back, into the files, names, order and dtypes of a template."""

    last = MANIFEST  # written when all else is

    def __init__(self, dist: Path, template: Path, out: Path) -> None:
        self.dist, self.template, self.out = dist, template, out

    def prepare(self) -> tuple[list[Unit], int]:
        """As ToDist.prepare; the units are the template's files."""
        model, files = NemotronH.from_folder(self.template), HfFiles(self.template)
        check_tensors(files, model)
        folder = iteration_folder(self.dist)
        DistSource(folder, model)
        purpose = {"dist": str(self.dist.resolve()), "hf": str(self.template.resolve())}
        purpose |= {"hash": HASH}  # one manifest has one kind
        dist_files = [path for path in folder.iterdir() if path.is_file()]
        source = {"source": fingerprint(dist_files), "template": fingerprint_hf(files)}
        claim(self.out, purpose | source)
        by_file: dict[str, list[str]] = {}
        for name, stored in files.tensors.items():
            by_file.setdefault(stored.file, []).append(name)
        units = [
            Unit(file, tuple(names), sum(files.tensors[name].num_bytes for name in names))
            for file, names in sorted(by_file.items())
        ]
        return units, max(stored.num_bytes for stored in files.tensors.values())

    def convert(self, unit: Unit) -> Report:
        """Write one file, which is then to be settled."""
        source, (_, files, _) = _source(self.dist, self.template), _opened(self.template)
        stored = read_header(self.template / unit.file)
        begin = min((one.begin for one in stored.values()), default=0)
        hashes: dict[str, dict[str, str]] = {}
        with (
            (self.template / unit.file).open("rb") as template,
            appearing(self.out / unit.file) as out,
        ):
            out.write(template.read(begin))
            for name, one in sorted(stored.items(), key=lambda item: item[1].begin):
                out.seek(one.begin)
                with contextlib.ExitStack() as stack:
                    if source.has(name):
                        read, theirs = source.read(name)
                        tensor = read.to(one.dtype)
                        ours = theirs if tensor is read else content_hash(tensor)
                        hashes[name] = {"hf": ours, "dist": theirs}
                        del read
                    else:  # of a run, which carries the MTP block through untrained
                        tensor = stack.enter_context(files.mapped(name))
                        hashes[name] = {"hf": content_hash(tensor)}
                    out.write(raw_bytes(tensor))
                    del tensor
        return Report(unit.file, unit.num_bytes, peak_rss(), {"hashes": hashes})

    def finish(self, units: Sequence[Unit]) -> None:
        copy_extras(self.template, self.out)
        if (self.template / INDEX).is_file():
            shutil.copyfile(self.template / INDEX, self.out / INDEX)
        tree_to_disk(self.out)
        write_manifest(self.out, units, {})


class DistSource:
    """HF tensors out of a torch_dist checkpoint, one at a time. Raises ValueError unless it holds
    exactly the model's keys, the MTP block or not, and besides them an optimizer's."""

    def __init__(self, folder: Path, model: NemotronH) -> None:
        self._dist = DistCheckpoint(folder)
        self._manifest = read_manifest(folder.parent)
        for file, digest in self._manifest["files"].items():
            if file_digest(folder / file) != digest:
                raise ValueError(f"{folder / file} is not what {MANIFEST} says: it has changed")
        self._check_keys(model)
        self._shapes = {n: t.shape for n, t in (hf_tensors(model) | mtp_tensors(model)).items()}
        # HF tensor -> (piece, first row within the piece, first and last row of the tensor)
        self._parts: dict[str, list[tuple[Piece, int, int, int]]] = {}
        for _, chunks in pieces(model):
            for piece in chunks:
                offset = 0
                for name, start, stop in piece.sources:
                    self._parts.setdefault(name, []).append((piece, offset, start, stop))
                    offset += stop - start

    def _check_keys(self, model: NemotronH) -> None:
        shapes = self._dist.shapes
        wanted = {p.key: p.global_shape for _, chunks in pieces(model) for p in chunks}
        mtp = set(mtp_tensors(model))
        if not mtp & set(shapes):
            wanted = {key: shape for key, shape in wanted.items() if key not in mtp}
        for key, shape in wanted.items():
            if shapes.get(key) != shape:
                found = f"has shape {shapes[key]}" if key in shapes else "is missing"
                raise ValueError(f"{self._dist.folder}: key {key!r} {found}, wanted is {shape}")
        unknown = sorted(key for key in set(shapes) - set(wanted) if "optimizer" not in key)
        if unknown:
            raise ValueError(
                f"{self._dist.folder}: {len(unknown)} keys are unknown to the layer pattern "
                f"{model.pattern!r} (MTP {model.mtp_pattern!r}): {', '.join(unknown[:3])}"
            )

    def has(self, name: str) -> bool:
        return all(piece.key in self._dist.shapes for piece, *_ in self._parts[name])

    def read(self, name: str) -> tuple[torch.Tensor, str]:
        """In the shape that HF knows, contiguous, with its hash. Raises ValueError for what is
        missing, corrupt, or not what the checkpoint's manifest says."""
        tensor = self._read(name).contiguous()
        found = content_hash(tensor)
        check_hash(self._manifest, "dist", name, found, self._dist.folder)
        return tensor, found

    def _read(self, name: str) -> torch.Tensor:
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


def verify(hf: Path, dist: Path) -> Iterator[tuple[str, int, bool]]:
    """(name, bytes, compared) of each HF tensor. Its bits are those of the torch_dist checkpoint,
    HF's being rounded to its dtype first; only a MTP block that is not in there is not compared.
    Raises ValueError naming the first tensor that differs, on either side from a manifest too."""
    model, files, manifest = _opened(hf)
    check_tensors(files, model)
    source = DistSource(iteration_folder(dist), model)
    for name, stored in files.tensors.items():
        if source.has(name):
            theirs, found = source.read(name)
            with files.mapped(name) as ours:
                check_hash(manifest, "hf", name, content_hash(ours), hf)
                if content_hash(ours.to(theirs.dtype)) != found:
                    raise ValueError(
                        f"tensor {name!r} differs between {hf / stored.file} and {dist}"
                    )
        yield name, stored.num_bytes, source.has(name)


def _written(one: Mapping[str, Any]) -> Written:
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
    return Written(**made)
