"""Bytes that a step moves, by link: inside a host (NVLink), between hosts (network), to the host
(PCIe). All are of the busiest device, in one direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Links:
    nvlink: float = 0.0
    network: float = 0.0
    pcie: float = 0.0

    def __add__(self, other: Links) -> Links:
        return Links(
            self.nvlink + other.nvlink, self.network + other.network, self.pcie + other.pcie
        )

    def times(self, factor: float) -> Links:
        return Links(self.nvlink * factor, self.network * factor, self.pcie * factor)

    def seconds(self, hardware: Hardware, efficiency: float = 1.0) -> float:
        """All links work at once; the slowest decides."""
        facts = hardware.facts
        return (
            max(
                self.nvlink / facts.nvlink_bytes_s,
                self.network / facts.network_bytes_s,
                self.pcie / facts.pcie_bytes_s,
            )
            / efficiency
        )


def spread(num_bytes: float, group: int, stride: int, hardware: Hardware) -> Links:
    """`num_bytes` from one rank evenly to all `group` ranks of its group, itself included, `stride`
    ranks apart: what leaves the device."""
    near = max(1, min(group, hardware.devices_per_node // stride))
    each = num_bytes / group
    return Links(nvlink=each * (near - 1), network=each * (group - near))


def expert_exchange(model: NemotronH, dims: ParallelDims, width: int, hardware: Hardware) -> Links:
    """Dispatch and combine of one token of one MoE layer in one pass, sent by the rank it is on: a
    copy for each of its experts."""
    num_bytes = 2 * model.top_k * model.expert_width * width
    return spread(num_bytes, dims.ep, dims.expert_tp, hardware)


def distinct_ranks(model: NemotronH, ep: int) -> float:
    """Ranks that a token's experts lie on, on average: copies that a dispatcher sends which never
    repeats itself."""
    per_rank = model.num_experts // ep
    missed = comb(model.num_experts - per_rank, model.top_k) / comb(model.num_experts, model.top_k)
    return ep * (1 - missed)


def layer_exchange(
    model: NemotronH, kind: str, dims: ParallelDims, width: int, hardware: Hardware
) -> Links:
    """What a layer sends for one token of a micro-batch, of the token's tensor-parallel ranks each,
    in one forward pass: gather and scatter of sequence parallelism, and experts."""
    found = Links()
    if dims.tp > 1:  # each rank sends its part of the sequence to the others, and gets sums back
        part = model.hidden_size * width / dims.tp
        found = spread(2 * part * dims.tp, dims.tp, 1, hardware)
    if kind == "E":
        found += expert_exchange(model, dims, width, hardware).times(1 / dims.tp)
    return found


def gradient_exchange(buffer_bytes: float, dp: int, stride: int, hardware: Hardware) -> Links:
    """Reduce-scatter or all-gather of a buffer over data-parallel ranks, `stride` ranks apart."""
    return spread(buffer_bytes, dp, stride, hardware) if dp > 1 else Links()


@dataclass(frozen=True, slots=True)
class SyncTraffic:
    """Of one weight sync."""

    total: int  # bytes that all engine ranks receive
    local: int  # of them, from the trainer rank on the same device
    nvlink: int
    network: int
    busiest: Links  # of the busiest device, sent or received


def sync_traffic(flows: Mapping[tuple[int, int], int], hardware: Hardware) -> SyncTraffic:
    """flows: bytes by (trainer rank, engine rank), which share devices by number."""
    per_node = hardware.devices_per_node
    totals: dict[str, int] = defaultdict(int)
    of_device: dict[tuple[str, str, int], int] = defaultdict(int)
    for (source, target), num_bytes in flows.items():
        near = source // per_node == target // per_node
        link = "local" if source == target else "nvlink" if near else "network"
        totals[link] += num_bytes
        of_device[link, "sent", source] += num_bytes
        of_device[link, "received", target] += num_bytes
    most = {
        name: max((n for (link, _, _), n in of_device.items() if link == name), default=0)
        for name in ("nvlink", "network")
    }
    return SyncTraffic(
        total=sum(flows.values()),
        local=totals["local"],
        nvlink=totals["nvlink"],
        network=totals["network"],
        busiest=Links(nvlink=most["nvlink"], network=most["network"]),
    )
