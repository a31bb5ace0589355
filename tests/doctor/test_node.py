"""Planted hosts: every check finds its own fault and says the values and the way out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_lite.cluster.network import open_ray
from miles_lite.compose import compose
from miles_lite.doctor import node
from miles_lite.doctor.finding import Finding, merged
from miles_lite.doctor.host import (
    Gpu,
    Host,
    _networks,
    measure,
    parse_gpus,
    parse_topology,
)
from miles_lite.doctor.needs import Needs
from miles_lite.planner.plan import read_model

H200 = Gpu(0, "NVIDIA H200", 143_771 << 20, 4 << 20, "570.86.15")

HEALTHY = Host(
    python="3.11.7",
    requirements=(
        *("torch>=2.6", "megatron-core<0.20,>=0.16.1", 'wandb>=0.19; extra == "wandb"'),
        'mamba-ssm>=2.2.4; extra == "gpu"',
    ),
    packages={"torch": "2.9.1", "megatron-core": "0.16.1", "mamba-ssm": "2.2.6"},
    code={"miles_lite/train.py": "c0de"},
    gpus=tuple(replace(H200, index=i) for i in range(8)),
    torch_cuda="12.8",
    links={(i, j): "NV18" for i in range(8) for j in range(i + 1, 8)},
    networks={f"mlx5_{i}/1": 400.0 for i in range(8)},
    memory_bytes=int(2e12),
    shm_bytes=int(1e12),
    shm_free=int(9e11),
    limits={"nofile": 1_048_576.0, "memlock": float("inf"), "nproc": float("inf")},
    free={"/shared/runs": int(90e12)},
    ray_folder_used=0.2,
    listening={},
    ephemeral=(32768, 60999, 100),
    open_ray={},
    clock_synced=True,
    shared={"/models/ultra": "f11e5"},
)


@pytest.fixture(scope="module")
def ultra() -> Needs:
    cfg = compose(["experiment=nemotron3_ultra", "log.folder=/shared/runs"])
    model, _ = read_model(cfg)
    return replace(Needs.of(cfg, model), shared=("/models/ultra",), ports=(6379, 7388))


def findings(host: Host, needs: Needs) -> dict[str, Finding]:
    return {finding.name: finding for finding in node.check(host, needs)}


def test_needs_of_ultra_are_the_plans(ultra: Needs) -> None:
    assert (ultra.device, ultra.num_hosts, ultra.gpus) == ("cuda", 16, 8)
    assert ultra.memory_bytes == pytest.approx(983e9, rel=0.01)  # as README has it
    (disk,) = ultra.rooms.values()
    assert disk > 2 * 549e9 * 14  # of two checkpoints: bf16 weights, fp32 master and moments
    assert ultra.network_gbit == pytest.approx(8 * 400, rel=0.01)
    assert 8 * (64 << 20) < ultra.shm_bytes < 2e9


def test_a_healthy_host_passes_everything(ultra: Needs) -> None:
    found = findings(HEALTHY, ultra)
    assert {name: f.status for name, f in found.items()} == dict.fromkeys(found, "ok")
    assert len(found) == 10
    assert "28 of 28 pairs of GPUs by NVLink" in found["links"].detail
    assert found["gpus"].detail.startswith("8 x NVIDIA H200 (driver 570.86.15)")


BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("versions", "failed", {"packages": {**HEALTHY.packages, "megatron-core": "0.21.0"}},
     "megatron-core 0.21.0 is not <0.20,>=0.16.1"),
    ("versions", "failed", {"packages": {"torch": "2.9.1", "megatron-core": "0.16.1"}},
     "mamba-ssm is missing"),
    ("versions", "failed", {"packages": {**HEALTHY.packages, "wandb": "0.18.0"}},
     "wandb 0.18.0 is not >=0.19"),
    ("versions", "warning", {"requirements": ()}, "not installed"),
    ("gpus", "failed", {"gpus": HEALTHY.gpus[:7]}, "7 of 8 are there"),
    ("gpus", "failed", {"torch_cuda": ""}, "without CUDA"),
    ("gpus", "warning", {"gpus": (*HEALTHY.gpus[:7], replace(H200, index=7, used_bytes=5 << 30))},
     "5.4 GB on GPU 7 taken already"),
    ("gpus", "warning", {"gpus": (replace(H200, total_bytes=80 << 30), *HEALTHY.gpus[1:])},
     "85.9 GB on GPU 0, planned with 141.0 GB"),
    ("links", "warning", {"links": {**HEALTHY.links, (2, 5): "SYS"}}, "GPU 2 and GPU 5 by SYS"),
    ("links", "warning", {"networks": {"eth0": 100.0}}, "100 Gbit/s known in all"),
    ("links", "warning", {"networks": {"eth0": 0.0}}, "eth0 of unknown speed"),
    ("links", "warning", {"networks": {}}, "no interface"),
    ("shm", "failed", {"shm_bytes": 64 << 20, "shm_free": 64 << 20}, "0.1 GB of 0.1 GB free"),
    ("shm", "warning", {"shm_bytes": int(50e9), "shm_free": int(50e9)}, "store of 200.0 GB"),
    ("memory", "failed", {"memory_bytes": int(500e9)}, "500.0 GB of host memory"),
    ("limits", "failed", {"limits": {**HEALTHY.limits, "nofile": 1024.0}}, "1024 open files"),
    ("limits", "warning", {"limits": {**HEALTHY.limits, "nofile": 10_000.0}}, "65536 wanted"),
    ("limits", "warning", {"limits": {**HEALTHY.limits, "nproc": 4096.0}}, "4096 processes"),
    ("limits", "warning", {"limits": {**HEALTHY.limits, "memlock": 8 << 20}}, "8 MiB of locked"),
    ("disk", "failed", {"free": {"/shared/runs": int(1e12)}}, "are missing"),
    ("disk", "failed", {"ray_folder_used": 0.97}, "Ray stops above 95%"),
    ("ports", "failed", {"listening": {6379: "process 7 (redis)"}}, "6379 by process 7 (redis)"),
    ("ports", "failed", {"ephemeral": (32768, 33000, 100)}, "few ports left"),
    ("open", "failed", {"open_ray": {"process 7 (gcs_server) at 0.0.0.0:6379": True}},
     "for the internet: process 7 (gcs_server) at 0.0.0.0:6379"),
    ("open", "warning", {"open_ray": {"process 7 (gcs_server) at 10.0.0.7:6379": False}},
     "for other hosts"),
    ("clock", "warning", {"clock_synced": False}, "not synchronised"),
    ("clock", "skipped", {"clock_synced": None}, "neither timedatectl nor chronyc"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "status", "fault", "told"), BROKEN)
def test_each_fault_is_found_by_its_line_alone(
    ultra: Needs, name: str, status: str, fault: dict[str, Any], told: str
) -> None:
    found = findings(replace(HEALTHY, **fault), ultra)
    assert found[name].status == status
    assert told in found[name].detail
    assert bool(found[name].fix) == (status != "skipped")
    assert "\n" not in found[name].line() and found[name].line().startswith(status)
    others = {other: f.status for other, f in found.items() if other != name}
    assert others == dict.fromkeys(others, "ok")


def test_gpus_that_are_wanted_and_cannot_be_seen(ultra: Needs) -> None:
    found = findings(replace(HEALTHY, gpus=None, links={}), ultra)
    assert found["gpus"].status == "failed" and "no nvidia-smi" in found["gpus"].detail
    assert found["links"].status == "warning"
    on_one_host = replace(ultra, num_hosts=1)
    assert findings(replace(HEALTHY, gpus=None, links={}), on_one_host)["links"].status != "ok"


def test_what_this_host_has_not_is_skipped_and_never_ok() -> None:
    found = findings(replace(HEALTHY, gpus=None, links={}), Needs(device="cpu"))
    assert (found["gpus"].status, found["links"].status) == ("skipped", "skipped")
    nothing_named = findings(replace(HEALTHY, gpus=None, links={}), Needs())
    assert nothing_named["gpus"].status == "skipped"


# ------------------------------------------------------------------ this very host


def test_a_port_in_use_is_found_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        needs = Needs(device="cpu", ports=(port, port))
        (taken,) = [f for f in node.check_here(needs) if f.name == "ports"]
    assert taken.status == "failed" and f"{port} by process" in taken.detail
    (free,) = [f for f in node.check_here(needs) if f.name == "ports"]
    assert free.status == "ok", free.detail


@pytest.mark.parametrize(("address", "mode"), [("0.0.0.0", "disabled"), ("127.0.0.1", "disabled"),
                                               ("0.0.0.0", "token")])  # fmt: skip
def test_a_ray_that_wants_no_token_is_found_here(tmp_path: Path, address: str, mode: str) -> None:
    """Of a program called as Ray's, and listening as it does."""
    program = tmp_path / "gcs_server"
    program.write_text(
        f"import socket; s = socket.create_server(('{address}', 0)); print(s.getsockname()[1])\n"
        "import sys; sys.stdout.flush(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"RAY_AUTH_MODE": mode},
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        found = [who for who in open_ray() if who.startswith(f"process {process.pid} ")]
        process.kill()
    assert bool(found) == (address == "0.0.0.0" and mode != "token")
    assert all(who.endswith(f" at 0.0.0.0:{port}") for who in found)


def test_measure_reads_this_host(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12")
    host = measure([str(tmp_path / "not" / "there")], [str(tmp_path), "/nowhere"], None)
    assert host.packages["megatron-core"] and any("torch" in r for r in host.requirements)
    assert host.free[str(tmp_path / "not" / "there")] > 0
    assert host.shared["/nowhere"] == "" and host.shared[str(tmp_path)]
    (tmp_path / "weights").write_bytes(b"1")
    assert measure([], [str(tmp_path)], None).shared != {str(tmp_path): host.shared[str(tmp_path)]}


def test_network_speeds_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    for folder in (port, tmp_path / "net" / "eth0" / "device", tmp_path / "net" / "lo"):
        folder.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (tmp_path / "net" / "eth0" / "speed").write_text("-1\n")
    (tmp_path / "net" / "lo" / "speed").write_text("100000\n")
    assert _networks(tmp_path) == {"mlx5_0/1": 400.0, "eth0": 0.0}


def test_what_nvidia_smi_prints_is_understood() -> None:
    """In its documented form; no GPU was there to print it."""
    (gpu,) = parse_gpus("0, NVIDIA H200, 143771, 4, 570.86.15\n")
    assert gpu == H200
    assert parse_gpus("0, NVIDIA H200, [N/A], 4, 1\n")[0].total_bytes == 0
    matrix = (
        "\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-47\nGPU1\tNV18\t X \tNV18\tSYS\t0-47\n"
        "GPU2\tSYS\tNV18\t X \tSYS\t48-95\nNIC0\tPIX\tSYS\tSYS\t X\n\nLegend:\n  X = Self\n"
    )
    assert parse_topology(matrix) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "NV18"}


# ------------------------------------------------------------------ beside each other


def test_hosts_that_differ_are_named(ultra: Needs) -> None:
    hosts = {f"10.0.0.{i}": HEALTHY for i in range(1, 5)}
    assert {f.status for f in node.differences(hosts, ultra)} == {"ok"}
    hosts["10.0.0.3"] = replace(
        HEALTHY,
        code={"miles_lite/train.py": "0ther"},
        packages={**HEALTHY.packages, "torch": "2.8.0"},
        gpus=HEALTHY.gpus[:7],
        shared={"/models/ultra": ""},
    )
    found = {f.name: f for f in node.differences(hosts, ultra)}
    assert {f.status for f in found.values()} == {"failed"} and len(found) == 4
    assert found["same code"].detail == "10.0.0.3 has miles_lite/train.py 0ther (others c0de)"
    assert "10.0.0.3 has torch 2.8.0 (others 2.9.1)" in found["same packages"].detail
    assert "10.0.0.3 has not there" in found["same /models/ultra"].detail


@pytest.mark.parametrize(("offset", "status"), [(0.1, "ok"), (-1.5, "warning"), (9.0, "failed")])
def test_clocks_are_compared_beyond_what_may_be_wrong(offset: float, status: str) -> None:
    found = node.clocks({"a": (0.0, 0.01), "b": (offset, 0.02)})
    assert found.status == status and "b is" in found.detail
    assert node.clocks({"a": (0.0, 0.0), "b": (9.0, 30.0)}).status == "ok"


def test_hosts_that_say_the_same_share_a_line() -> None:
    fine, bad = Finding("shm", "ok", "1 GB"), Finding("shm", "failed", "0 GB", "more")
    lines = [f.line() for f in merged([("a", fine), ("b", bad), ("c", fine)])]
    assert lines == [
        "ok       shm                2 hosts: 1 GB",
        "failed   shm                b: 0 GB -> more",
    ]
