"""What is measured on one host, without Ray and without an opinion: `node` judges it."""

from __future__ import annotations

import hashlib
import platform
import re
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from miles_lite.cluster.network import ephemeral_range, listening, open_ray
from miles_lite.environment import PROJECT, code_digests, output

SHM = Path("/dev/shm")
RAY_FOLDER = Path("/tmp")  # where Ray keeps sessions and what its store spills
GPU_FIELDS = "index,name,memory.total,memory.used,driver_version"


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    name: str
    total_bytes: int
    used_bytes: int
    driver: str


@dataclass(frozen=True, slots=True)
class Host:
    python: str
    requirements: tuple[str, ...]  # of the package's own metadata; () if it is not installed
    packages: Mapping[str, str]  # versions of those that are there
    code: Mapping[str, str]  # digest by file of the project
    gpus: tuple[Gpu, ...] | None  # None: there is no nvidia-smi
    torch_cuda: str  # CUDA version that torch was built for; "" for none
    links: Mapping[tuple[int, int], str]  # between two GPUs, as nvidia-smi names them
    networks: Mapping[str, float]  # Gbit/s of interfaces that are up; 0: it does not say
    memory_bytes: int
    shm_bytes: int  # all of /dev/shm; 0 if there is none
    shm_free: int
    limits: Mapping[str, float]  # nofile (hard: Ray raises the soft one), memlock, nproc
    free: Mapping[str, int]  # bytes by folder that a run writes to
    ray_folder_used: float  # share of its file system
    listening: Mapping[int, str]  # ports asked about that are taken, and by whom
    ephemeral: tuple[int, int, int]  # first and last port that the system deals out; taken ones
    open_ray: Mapping[str, bool]  # Rays that want no token, and whether the internet reaches them
    clock_synced: bool | None  # None: nothing here knows
    shared: Mapping[str, str]  # digest of names and sizes in a folder; "": not there


def measure(rooms: Sequence[str], shared: Sequence[str], ports: tuple[int, int] | None) -> Host:
    """Of the host this runs on. Takes seconds, most of them for importing torch.

    rooms: folders whose room counts; they need not be there yet. shared: folders that all hosts
    must see alike. ports: first and last of a block that will be listened on.
    """
    import torch.version

    requirements = _requirements()
    names = sorted({Requirement(text).name for text in requirements})
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    tmp = shutil.disk_usage(_existing(RAY_FOLDER))
    gpus = _gpus()
    first, last = ephemeral_range()
    used = {entry.laddr.port for entry in psutil.net_connections("inet") if entry.laddr}
    return Host(
        python=platform.python_version(),
        requirements=requirements,
        packages={name: found for name in names if (found := _version(name))},
        code=code_digests(PROJECT),
        gpus=gpus,
        torch_cuda=torch.version.cuda or "",
        links=parse_topology(output("nvidia-smi", "topo", "-m") or "") if gpus else {},
        networks=_networks(Path("/sys/class")),
        memory_bytes=psutil.virtual_memory().total,
        shm_bytes=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        limits={
            "nofile": _limit(resource.RLIMIT_NOFILE, hard=True),
            "memlock": _limit(resource.RLIMIT_MEMLOCK),
            "nproc": _limit(resource.RLIMIT_NPROC),
        },
        free={room: shutil.disk_usage(_existing(Path(room))).free for room in rooms},
        ray_folder_used=1 - tmp.free / tmp.total,
        listening=listening(*ports) if ports else {},
        ephemeral=(first, last, sum(first <= port <= last for port in used)),
        open_ray=open_ray(),
        clock_synced=_clock_synced(),
        shared={folder: _listing(Path(folder)) for folder in shared},
    )


# ------------------------------------------------------------------ packages and code


def _requirements() -> tuple[str, ...]:
    try:
        return tuple(metadata.requires("miles-lite") or ())
    except metadata.PackageNotFoundError:
        return ()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# ------------------------------------------------------------------ devices and links


def _gpus() -> tuple[Gpu, ...] | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = f"--query-gpu={GPU_FIELDS}"
    return parse_gpus(output("nvidia-smi", query, "--format=csv,noheader,nounits") or "")


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """nvidia-smi's CSV of GPU_FIELDS; memory in MiB."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if "," in line]
    return tuple(
        Gpu(int(index), name, _mib(total), _mib(used), driver)
        for index, name, total, used, driver in rows
    )


def _mib(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0  # "[N/A]" where MIG is on


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """(i, j), i < j -> NV18, PIX, SYS, ... of `nvidia-smi topo -m`, whose header names columns."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in plain.splitlines() if line.strip()]
    header = next(
        (row for row in rows if row[0] == "GPU0" and row[-1] != "X" and "X" not in row), []
    )
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU\d+", word)]
    found = {}
    for row in rows:
        if re.fullmatch(r"GPU\d+", row[0]) and "X" in row:
            for column, link in zip(columns, row[1:], strict=False):
                if column > int(row[0][3:]):
                    found[int(row[0][3:]), column] = link
    return found


def _networks(sys_class: Path) -> dict[str, float]:
    """InfiniBand ports and interfaces of hardware that are up."""
    found = {}
    for path in sorted((sys_class / "infiniband").glob("*/ports/*")):
        if "ACTIVE" in _text(path / "state"):
            name = f"{path.parent.parent.name}/{path.name}"
            found[name] = float(_text(path / "rate").partition(" ")[0] or 0)
    for path in sorted((sys_class / "net").glob("*")):
        # one without a device is virtual: loopback, bridge, veth
        if (path / "device").exists() and _text(path / "operstate") != "down":
            found[path.name] = max(0.0, float(_text(path / "speed") or 0) / 1000)
    return found


# ------------------------------------------------------------------ the system


def _limit(which: int, hard: bool = False) -> float:
    value = resource.getrlimit(which)[1 if hard else 0]
    return float("inf") if value == resource.RLIM_INFINITY else float(value)


def _existing(folder: Path) -> Path:
    """It, or the nearest folder above it that is there."""
    absolute = folder.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def _clock_synced() -> bool | None:
    for command in (("timedatectl", "show", "-p", "NTPSynchronized"), ("chronyc", "tracking")):
        told = output(*command) or ""
        if "NTPSynchronized=" in told:
            return told.strip().endswith("=yes")
        if "Leap status" in told:
            return "Leap status     : Normal" in told
    return None


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    entries = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    return hashlib.blake2b(repr(entries).encode(), digest_size=8).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # an interface that is down refuses to tell its speed
        return ""
