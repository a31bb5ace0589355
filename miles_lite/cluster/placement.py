"""Which process sits where: one bundle a device, shared by a trainer and an engine rank."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_lite.config import Config, ConfigError
from miles_lite.protocols import RunError

SETTLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Bundle:
    """One device of the cluster, reserved for this run."""

    group: Any  # Ray's placement group
    index: int  # of the bundle in the group
    resource: str  # "GPU" or CPU_DEVICE
    host: str  # IP address of its node
    device: int  # device number on the node


class _Probe:
    """Reports where a bundle landed."""

    def where(self) -> tuple[str, int]:
        gpus = ray.get_gpu_ids()
        return ray.util.get_node_ip_address(), int(gpus[0]) if gpus else 0


def reserve(num_devices: int, resource: str, deadline_s: float) -> list[Bundle]:
    """Reserve devices; neighbours in the list are neighbours in the cluster (by host, then device).

    Raises ValueError when the cluster has fewer devices, RunError when they stay busy.
    """
    total = _settled(num_devices, resource, min(deadline_s, SETTLE_S))
    if total < num_devices:
        raise ValueError(
            f"{num_devices} devices wanted (parallel.tp x pp x dp) but Ray sees {total} of "
            f"resource {resource!r}: start more nodes or choose a smaller layout"
        )
    group = placement_group([{resource: 1}] * num_devices, strategy="PACK")
    if not group.wait(deadline_s):
        free = int(ray.available_resources().get(resource, 0))
        raise RunError(
            f"{num_devices} devices were not free within {deadline_s:g} s: {free} of {total} are; "
            "another run may hold them"
        )
    probe: Any = ray.remote(_Probe)  # Ray types an actor class as the class itself
    probes = [
        probe.options(
            num_cpus=0,
            num_gpus=0.01 if resource == "GPU" else 0,
            resources={} if resource == "GPU" else {resource: 0.01},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=i
            ),
        ).remote()
        for i in range(num_devices)
    ]
    places = ray.get([p.where.remote() for p in probes], timeout=deadline_s)
    for p in probes:
        ray.kill(p)
    bundles = [Bundle(group, i, resource, host, device) for i, (host, device) in enumerate(places)]
    return sorted(bundles, key=lambda b: (_number(b.host), b.device, b.index))


def groups_of_neighbours(cfg: Config) -> dict[str, int]:
    """Sizes of the groups that exchange most and should stay on a host; all are of neighbours."""
    dims, engine = cfg.parallel.dims, cfg.rollout.engine.dims
    return {
        "parallel.tp": dims.tp,
        "parallel.expert_tp x ep": dims.expert_tp * dims.ep,
        "rollout.engine.tp / dp": engine.attn_tp,
        "rollout.engine.tp": engine.tp,
    }


def check_groups(hosts: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Refuse a placement where a group crosses the network without need.

    hosts: of each rank. sizes: by the key that sets it, the size of a group of neighbouring ranks;
    one that is larger than a host may lie on as few hosts as can hold it. Raises ConfigError.
    """
    per_host = Counter(hosts)
    largest = max(per_host.values())
    for key, size in sizes.items():
        for first in range(0, len(hosts), size):
            found = sorted(set(hosts[first : first + size]), key=_number)
            if len(found) > math.ceil(size / largest):
                shares = ", ".join(f"{host} {number}" for host, number in per_host.items())
                raise ConfigError(
                    f"{key} = {size}: ranks {first} to {first + size - 1} would lie on "
                    f"{' and '.join(found)}, as the hosts give {shares} devices: let each give the "
                    f"same multiple of {size}, or choose a size that divides what they give"
                )


def _settled(num_devices: int, resource: str, deadline_s: float) -> int:
    """Devices of the cluster, once there are enough: what a host that just joined has is known a
    moment later."""
    deadline = time.monotonic() + deadline_s
    while True:
        total = int(ray.cluster_resources().get(resource, 0))
        if total >= num_devices or time.monotonic() > deadline:
            return total
        time.sleep(0.2)


def _number(host: str) -> int:
    """By which addresses are sorted: 10.0.0.9 comes before 10.0.0.10."""
    return int(ipaddress.ip_address(host))
