"""Judging one host, and several beside each other: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from packaging.requirements import Requirement

from miles_lite.doctor.finding import Finding, graded, ok, skipped
from miles_lite.doctor.host import Host, measure
from miles_lite.doctor.needs import Needs
from miles_lite.log import few

MIN_FILES, MANY_FILES = 4096, 65_536  # open files of a process, on one host and on several
MIN_PROCESSES = 16_384  # threads count too
RAY_SHARE, RAY_STORE = 0.3, 200e9  # of memory, and at most: what Ray's store takes on its own
RAY_FULL = 0.95  # of the file system of its folder: beyond that Ray makes no objects
GPU_USED = 1 << 30  # more than this on a GPU is somebody else's
MIN_FREE_PORTS = 2000
SKEW_S, MAX_SKEW_S = 0.5, 5.0  # between the clocks of two hosts
ENOUGH = 0.9  # of the memory of the hardware file: data sheets round up


def check_here(needs: Needs) -> list[Finding]:
    """All checks of the host this runs on. Needs no Ray."""
    return check(measure(tuple(needs.rooms), needs.shared, needs.ports), needs)


def check(host: Host, needs: Needs) -> list[Finding]:
    return [one(host, needs) for one in CHECKS]


def _versions(host: Host, needs: Needs) -> Finding:
    """Required packages are there, and all are in the ranges of pyproject.toml."""
    name, bad = "versions", []
    if not host.requirements:
        lack = ["miles-lite is not installed, so its pins are unknown -> pip install -e ."]
        return graded(name, f"Python {host.python}", [], lack)
    extras = ["", *(["gpu"] if needs.device == "cuda" else [])]
    for requirement in map(Requirement, host.requirements):
        found = host.packages.get(requirement.name, "")
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        )
        if not found and wanted:
            bad.append(f"{requirement.name} is missing (wanted {requirement.specifier})")
        elif found and not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement.name} {found} is not {requirement.specifier}")
    fix = ' -> bash scripts/setup.sh, or pip install -e ".[gpu]" on GPUs'
    told = f"Python {host.python}, {len(host.packages)} packages within their pins"
    told += f", torch {host.packages.get('torch', 'missing')}"
    failures = [f"{', '.join(dict.fromkeys(bad))}{fix}"] if bad else []
    return graded(name, "" if bad else told, failures, [])


def _gpus(host: Host, needs: Needs) -> Finding:
    name = "gpus"
    if needs.device == "cpu":
        return skipped(name, "the experiment runs on CPU")
    if host.gpus is None:
        if needs.gpus:
            lack = f"{needs.gpus} wanted, and there is no nvidia-smi -> install the driver, or "
            return graded(name, "", [lack + "start the container with --gpus all"], [])
        return skipped(name, "there is no nvidia-smi on this host")
    bad, odd = [], []
    if len(host.gpus) < needs.gpus:
        bad.append(f"{len(host.gpus)} of {needs.gpus} are there -> look at nvidia-smi -L and dmesg")
    if not host.torch_cuda:
        bad.append("torch is built without CUDA -> install a CUDA build of torch")
    if small := [g for g in host.gpus if g.total_bytes < ENOUGH * needs.gpu_bytes]:
        odd.append(
            f"{_gb(small[0].total_bytes)} on GPU {small[0].index}, planned with "
            f"{_gb(needs.gpu_bytes)} -> miles-lite plan --gpu NAME for what is there"
        )
    if busy := [gpu for gpu in host.gpus if gpu.used_bytes > GPU_USED]:
        held = ", ".join(f"{_gb(gpu.used_bytes)} on GPU {gpu.index}" for gpu in busy)
        odd.append(f"{held} taken already -> end the process that nvidia-smi names")
    names = " and ".join(sorted({f"{gpu.name} (driver {gpu.driver})" for gpu in host.gpus}))
    return graded(name, f"{len(host.gpus)} x {names}, torch for CUDA {host.torch_cuda}", bad, odd)


def _links(host: Host, needs: Needs) -> Finding:
    odd, told = [], []
    pairs = list(combinations(sorted(gpu.index for gpu in host.gpus or ()), 2))
    if pairs and needs.device != "cpu":
        slow = [pair for pair in pairs if not host.links.get(pair, "").startswith("NV")]
        told.append(f"{len(pairs) - len(slow)} of {len(pairs)} pairs of GPUs by NVLink")
        if slow:
            a, b = slow[0]
            how = host.links.get((a, b), "unknown")
            odd.append(f"GPU {a} and GPU {b} by {how}, so TP and EP are slow -> nvidia-smi topo -m")
    elif needs.gpus > 1:
        odd.append("no GPUs to be seen, nor what joins them -> look at the line of gpus")
    if needs.num_hosts == 1 and not (told or odd):
        return skipped("links", "no two GPUs and one host: no link carries anything")
    if needs.num_hosts == 1:
        return graded("links", "".join(told), [], odd)
    speeds = ", ".join(
        f"{name} {f'{gbit:g} Gbit/s' if gbit else 'of unknown speed'}"
        for name, gbit in host.networks.items()
    )
    told.append(f"network: {speeds or 'none'}")
    whole = sum(host.networks.values())
    fix = "-> a faster network, or the true speed in configs/hardware (network_bytes_s)"
    if not host.networks:
        odd.append("no interface with a device is up -> ip link; NCCL needs one to other hosts")
    elif whole < needs.network_gbit:
        odd.append(f"{whole:g} Gbit/s known in all, planned with {needs.network_gbit:g} {fix}")
    return graded("links", "; ".join(told), [], odd)


def _shm(host: Host, needs: Needs) -> Finding:
    fix = "-> mount -o remount,size=... /dev/shm, or docker run --shm-size=..."
    store = min(RAY_SHARE * host.memory_bytes, RAY_STORE)
    bad, odd = [], []
    if host.shm_free < needs.shm_bytes:
        bad.append(f"{_gb(needs.shm_bytes)} wanted by answers in Ray's store and by ranks {fix}")
    elif host.shm_bytes < store:
        odd.append(f"Ray's store of {_gb(store)} will lie in /tmp {fix}")
    return graded("shm", f"{_gb(host.shm_free)} of {_gb(host.shm_bytes)} free", bad, odd)


def _memory(host: Host, needs: Needs) -> Finding:
    told = f"{_gb(host.memory_bytes)} of host memory, {_gb(needs.memory_bytes)} planned"
    short = host.memory_bytes < needs.memory_bytes
    lack = "too little host memory -> miles-lite plan says what takes it, and what fits"
    return graded("memory", told, [lack] if short else [], [])


def _limits(host: Host, needs: Needs) -> Finding:
    files, locked, processes = (host.limits[k] for k in ("nofile", "memlock", "nproc"))
    bad, odd = [], []
    wanted = MIN_FILES if needs.num_hosts == 1 else MANY_FILES
    if files < wanted:
        (bad if files < MIN_FILES else odd).append(
            f"{files:g} open files, {wanted} wanted -> ulimit -Hn {MANY_FILES} (limits.conf)"
        )
    if processes < MIN_PROCESSES:
        odd.append(
            f"{processes:g} processes and threads, {MIN_PROCESSES} wanted -> ulimit -u unlimited"
        )
    if needs.num_hosts > 1 and needs.device == "cuda" and locked != float("inf"):
        odd.append(
            f"{locked / 2**20:g} MiB of locked memory, and InfiniBand registers more -> "
            "ulimit -l unlimited"
        )
    told = f"open files {files:g}, processes {processes:g}, locked memory "
    told += "unlimited" if locked == float("inf") else f"{locked / 2**20:g} MiB"
    return graded("limits", told, bad, odd)


def _disk(host: Host, needs: Needs) -> Finding:
    bad, told = [], []
    for room, wanted in needs.rooms.items():
        told.append(f"{_gb(host.free[room])} free for {room}, {_gb(wanted)} to be written")
        if host.free[room] < wanted:
            bad.append(
                f"{_gb(wanted - host.free[room])} are missing -> another log.folder, "
                "or a smaller checkpoint.keep"
            )
    told.append(f"/tmp {host.ray_folder_used:.0%} full")
    if host.ray_folder_used > RAY_FULL:
        bad.append(f"Ray stops above {RAY_FULL:.0%} of /tmp -> make room there")
    return graded("disk", ", ".join(told), bad, [])


def _ports(host: Host, needs: Needs) -> Finding:
    first, last, used = host.ephemeral
    free = last - first + 1 - used
    bad = [] if free >= MIN_FREE_PORTS else ["few ports left -> net.ipv4.ip_local_port_range"]
    told = f"{free} of {last - first + 1} to be dealt out are free ({first} to {last})"
    if needs.ports:
        block = f"{needs.ports[0]} to {needs.ports[1]}"
        taken = [f"{port} by {who}" for port, who in sorted(host.listening.items())]
        if taken:
            bad.append(
                f"of {block} are taken: {', '.join(taken[:5])} -> end what listens there, or "
                "choose another block"
            )
        told = f"{block} {'' if taken else 'are free'}".strip() + f"; {told}"
    return graded("ports", told, bad, [])


def _open(host: Host, needs: Needs) -> Finding:
    fix = "-> end it, or let miles-lite start it, with a token of its own: SECURITY.md"
    bad, odd = [], []
    for who, is_public in host.open_ray.items():
        reach = "the internet" if is_public else "other hosts"
        told = f"Ray without a token runs code for {reach}: {who} {fix}"
        (bad if is_public else odd).append(told)
    return graded("open", "" if bad or odd else "no Ray runs code for whoever asks", bad, odd)


def _clock(host: Host, needs: Needs) -> Finding:
    if host.clock_synced is None:
        return skipped("clock", "neither timedatectl nor chronyc answers on this host")
    if host.clock_synced:
        return ok("clock", "synchronised by NTP")
    return graded("clock", "", [], ["not synchronised -> start chrony or systemd-timesyncd"])


CHECKS: Sequence[Callable[[Host, Needs], Finding]] = (
    *(_versions, _gpus, _links, _shm, _memory, _limits, _disk, _ports, _open, _clock),
)


# ------------------------------------------------------------------ beside each other


def differences(hosts: Mapping[str, Host], needs: Needs) -> list[Finding]:
    """What hosts of one run must have alike."""
    alike: list[tuple[str, Callable[[Host], object], str]] = [
        ("same code", lambda host: host.code, "bring all hosts to one commit"),
        ("same packages", _packages, "install the same versions on all hosts"),
        ("same gpus", _gpu_kinds, "hosts of one kind, all GPUs up"),
        *(
            (f"same {folder}", _shared(folder), "one file system that all hosts see")
            for folder in needs.shared
        ),
    ]
    return [
        _alike(name, {h: of(host) for h, host in hosts.items()}, fix) for name, of, fix in alike
    ]


def _packages(host: Host) -> object:
    return {"Python": host.python, **host.packages}


def _gpu_kinds(host: Host) -> object:
    return [f"{gpu.name}, driver {gpu.driver}" for gpu in host.gpus or ()]


def _shared(folder: str) -> Callable[[Host], object]:
    return lambda host: host.shared[folder] or "not there"


def _alike(name: str, values: Mapping[str, object], fix: str) -> Finding:
    """Against the most common value; of mappings only what differs is told."""
    usual = max(values.values(), key=lambda value: sum(v == value for v in values.values()))
    odd = {host: value for host, value in values.items() if value != usual}
    if not odd:
        return ok(name, f"on all {len(values)} hosts")
    told = [f"{host} has {_difference(value, usual)}" for host, value in odd.items()]
    return Finding(name, "failed", "; ".join(told), fix)


def _difference(value: object, usual: object) -> str:
    if isinstance(value, Mapping) and isinstance(usual, Mapping):
        names = [k for k in {**usual, **value} if value.get(k) != usual.get(k)]
        return few(
            [f"{k} {value.get(k, 'missing')} (others {usual.get(k, 'none')})" for k in names]
        )
    return f"{value or 'none'} (others {usual or 'none'})"


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """offsets: seconds of each host's clock before this one's, and how far that may be wrong."""
    sure = {h: max(0.0, abs(offset) - error) for h, (offset, error) in offsets.items()}
    worst = max(sure, key=lambda host: sure[host])
    offset, error = offsets[worst]
    told = f"{worst} is {offset:+.3f} s off this host, to within {error:.3f} s"
    lack = ["clocks differ -> chrony or NTP on all hosts"]
    far = sure[worst] > MAX_SKEW_S
    return graded("clocks", told, lack if far else [], lack if sure[worst] > SKEW_S else [])


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
