"""What both directions of a conversion share: units of work, checks, notes of what is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from miles_lite.intact import HASH, OTHER_HASH, digest, to_disk
from miles_lite.models.nemotron_h import NemotronH, spell_pattern
from miles_lite.untrusted import check_inner_path, parse_json, parse_object
from miles_lite.weights.hf_files import INDEX, HfFiles
from miles_lite.weights.table import hf_tensors, mtp_tensors

METADATA = ".metadata"  # of a torch_dist folder
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what Megatron calls a checkpoint without iterations
MANIFEST = "manifest.json"
PROGRESS = ".progress"
MIN_UNIT, MAX_UNIT = 64 << 20, 2 << 30  # bytes of one output file
FIXED_BYTES = 1 << 30  # of a worker: python, torch, and room to breathe


@dataclass(frozen=True, slots=True)
class Unit:
    """One output file and what goes into it."""

    file: str  # below the output folder
    tensors: tuple[str, ...]  # of HF
    num_bytes: int  # of the tensors as they are written

    @property
    def note(self) -> str:
        """Where it is noted, below the output folder, that the file is finished."""
        return f"{PROGRESS}/{Path(self.file).name}.json"


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one unit, or of one tensor."""

    file: str
    num_bytes: int
    peak_rss: int  # bytes, of the process that did it
    told: Mapping[str, Any] = field(default_factory=dict)  # what is to be noted


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
        stored = files.tensors[name]
        if stored.shape != tensor.shape:
            raise ValueError(
                f"{files.folder}: tensor {name!r} has shape {stored.shape}, config.json makes it "
                f"{tensor.shape}"
            )
    halves = {stored.dtype: name for name, stored in files.tensors.items()}
    halves.pop(torch.float32, None)
    if len(halves) > 1:  # the same bits mean other numbers
        told = " and ".join(f"{name!r} is {dtype}" for dtype, name in halves.items())
        raise ValueError(f"{files.folder}: tensor {told}: one of them has the wrong dtype")


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
    return (out / unit.note).is_file()


def intact(out: Path, unit: Unit) -> bool:
    """The same, and the file is there as long as it was; else the note is void from now on."""
    file = out / unit.file
    if not done(out, unit):
        return False
    with contextlib.suppress(ValueError, KeyError):
        if file.is_file() and file.stat().st_size == noted(out, unit)["bytes"]:
            return True
    (out / unit.note).unlink()
    return False


def iteration_folder(dist: Path) -> Path:
    """The folder that holds `.metadata`: `dist` itself, or what its tracker names."""
    if (dist / METADATA).is_file():
        return dist
    tracker = dist / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{dist} is no torch_dist checkpoint: neither {METADATA} nor {TRACKER}")
    name = tracker.read_bytes().decode(errors="replace").strip()
    return dist / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def copy_extras(source: Path, target: Path) -> None:
    """Config, tokenizer, template and whatever else is no weights, folders too; hidden ones are
    what a download left. The layer pattern is spelled so that everybody reads it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            if not path.name.startswith("."):
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.suffix != ".safetensors" and path.name not in (INDEX, MANIFEST):
            shutil.copyfile(path, target / path.name)
    spell_pattern(target / "config.json")


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes when one of the files does; reads none of them."""
    stats = [(path.name, path.stat()) for path in sorted(paths)]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_hf(files: HfFiles) -> str:
    names = {stored.file for stored in files.tensors.values()} | {"config.json"}
    return fingerprint(files.folder / name for name in names)


def content_hash(tensor: torch.Tensor) -> str:
    """Of the bytes of a contiguous tensor."""
    return digest(raw_bytes(tensor))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that `settle` is to give its name; nothing is left of a failed one."""
    part = _part(path)
    try:
        with part.open("wb") as out:
            yield out
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def settle(out: Path, unit: Unit, report: Report) -> None:
    """Have a file that was written on disk, then give it its name, then note it. Apart from the
    writing, so that the writer need not wait for the disk."""
    part, path = _part(out / unit.file), out / unit.file
    to_disk(part)
    part.replace(path)
    to_disk(path.parent)
    note(out, unit, report.told)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def claim(out: Path, purpose: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything else."""
    told = out / PROGRESS / "purpose.json"
    # an empty PROGRESS is of a rank that is about to say what it is for, or was killed then; looked
    # at before `told`, as a rank that says so just now writes more after it
    others = out.is_dir() and any(path.name != PROGRESS for path in out.iterdir())
    if told.is_file():
        if (before := parse_json(told.read_bytes(), str(told))) != purpose:
            raise ValueError(f"{out} holds another conversion, of {before}: choose another --out")
    elif others:
        raise ValueError(f"{out} is not empty and was not made by this conversion")
    (out / PROGRESS).mkdir(parents=True, exist_ok=True)
    replace_text(told, json.dumps(purpose))


def note(out: Path, unit: Unit, value: Mapping[str, Any]) -> None:
    size = (out / unit.file).stat().st_size
    replace_text(out / unit.note, json.dumps({**value, "bytes": size}))


def noted(out: Path, unit: Unit) -> dict[str, Any]:
    return json.loads((out / unit.note).read_text())


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """`tensors` (HF name: {"hf": hash, "dist": hash}) and `files` (name: hash); both empty where no
    conversion wrote one."""
    path = folder / MANIFEST
    try:
        manifest = parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
        if "tensors" not in manifest:
            return {"tensors": {}, "files": {}}
        kind = manifest.get("hash")
        tensors = {name: dict(hashes) for name, hashes in manifest["tensors"].items()}
        files = dict(manifest["files"])
        for file in files:
            check_inner_path(file, MANIFEST)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r})") from None
    if kind != HASH:
        raise ValueError(
            f"{path}: {OTHER_HASH}; convert again, or remove it to go on with nothing to check by"
        )
    return {"tensors": tensors, "files": files}


def check_hash(
    manifest: Mapping[str, Mapping[str, Any]], side: str, name: str, found: str, where: Path
) -> None:
    """Raise ValueError if a manifest knows the tensor and has another hash of it."""
    wanted = manifest["tensors"].get(name, {}).get(side, found)
    if wanted != found:
        raise ValueError(
            f"{where}: tensor {name!r} is not what {MANIFEST} says: one of them has changed"
        )


def write_manifest(out: Path, units: Sequence[Unit], files: Mapping[str, str]) -> None:
    hashes = {name: value for unit in units for name, value in noted(out, unit)["hashes"].items()}
    replace_text(
        out / MANIFEST, json.dumps({"hash": HASH, "tensors": hashes, "files": files}, indent=1)
    )


def replace_text(path: Path, text: str) -> None:
    """On disk when this returns."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    part.write_text(text)
    to_disk(part)
    part.replace(path)
    to_disk(path.parent)


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
