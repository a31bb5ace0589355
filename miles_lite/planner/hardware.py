"""What devices and their hosts can do: facts of data sheets, and assumptions, all with meanings.

configs/hardware/NAME.yaml holds the figures; nothing else in the planner is assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from miles_lite.compose import CONFIGS, build
from miles_lite.config import ConfigError


def _means(text: str) -> float:
    return field(metadata={"means": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Of data sheets; of a link, one direction, of one device."""

    devices_per_node: float = _means("devices of one host")
    device_bytes: float = _means("memory of a device")
    flops: float = _means("dense bf16 operations a second of a device")
    device_bytes_s: float = _means("bandwidth of a device's memory")
    nvlink_bytes_s: float = _means("from a device to others of its host")
    network_bytes_s: float = _means("from a device to other hosts")
    pcie_bytes_s: float = _means("between a device and its host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    host_bytes: float = _means("memory of a host")
    disk_bytes: float = _means("room on the file system that all hosts see")
    host_bytes_s: float = _means("bandwidth of a host's memory, of all its devices together")
    disk_bytes_s: float = _means("of that file system, all hosts together")
    train_mfu: float = _means("share of the peak that a stage reaches while it trains")
    score_mfu: float = _means("share of the peak in passes without gradients, and in prefill")
    link_efficiency: float = _means("share of a link's bandwidth that exchanges reach")
    decode_efficiency: float = _means("share of memory bandwidth that decoding reaches")
    engine_step_s: float = _means("scheduling and sampling of one decode step")
    collective_s: float = _means(
        "latency of a small collective of an engine, times log2 of its ranks"
    )
    expert_imbalance: float = _means("tokens of the busiest rank's experts over the mean")
    mean_response_share: float = _means("mean answer over the longest allowed; lengths even")
    mean_prompt_tokens: float = _means("mean length of a prompt")
    phase_s: float = _means("entering a phase, besides the bytes that move")
    trainer_context_bytes: float = _means("CUDA context and communicators of a trainer rank")
    engine_context_bytes: float = _means("the same of an engine rank")
    graph_bytes: float = _means("CUDA graphs of an engine rank, with their buffers")
    fragmentation: float = _means("share of a device that allocators lose")
    host_reserved_bytes: float = _means("of a host: system, Ray, graders, page cache")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    name: str
    facts: Facts
    assumed: Assumed

    @property
    def devices_per_node(self) -> int:
        return int(self.facts.devices_per_node)

    @classmethod
    def named(cls, name: str) -> Hardware:
        """That of configs/hardware, or of a YAML file of the same form. Raises ConfigError."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        known = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
        path = CONFIGS / "hardware" / f"{name}.yaml" if name in known else Path(name)
        if not path.is_file():
            raise ConfigError(
                f"hardware {name!r} is neither a file nor one of {', '.join(known)} "
                "(cluster.hardware, or --gpu)"
            )
        try:
            raw = OmegaConf.to_container(OmegaConf.load(path))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: wanted sections facts and assumed")
        found = build(cls, {"name": path.stem} | {str(k): v for k, v in raw.items()}, "hardware.")
        for section, name_, value, _ in found.lines():
            if value < 0 or (section == "facts" and value == 0):
                raise ConfigError(f"{path}: {section}.{name_} = {value} is not positive")
        return found

    def lines(self) -> Iterator[tuple[str, str, float, str]]:
        """(facts or assumed, name, value, meaning) of every figure."""
        for section in ("facts", "assumed"):
            part = getattr(self, section)
            for entry in fields(part):
                yield section, entry.name, getattr(part, entry.name), entry.metadata["means"]
