"""That bytes are what they were: hashes that find faults, files that outlive a power cut, and what
is said when they cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from miles_lite.protocols import RunError

# As manifests name it. Against faults and not malice, for which 128 bits are plenty; as fast as
# memory, where SHA-256 and BLAKE2 are slower than a disk.
HASH = "xxh3_128"
OTHER_HASH = f"its hashes are not {HASH}: another version wrote it"


def digest(data: memoryview) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's contents; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError:
        return ""


def to_disk(path: Path) -> None:
    """The contents of a file, or the entries of a folder, are on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tree_to_disk(folder: Path) -> None:
    """The same of all there is below a folder, and of itself."""
    for path in (*folder.rglob("*"), folder):
        to_disk(path)


@contextlib.contextmanager
def writing(path: Path, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn a failing write into RunError, with what, why, and how full the disk is: a full one is
    the usual end of a long run. kinds: what a library makes of an OSError."""
    try:
        yield
    except (OSError, *kinds) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write {path}: {why}; {room(path)}") from error


def room(path: Path) -> str:
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there"
