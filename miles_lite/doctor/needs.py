"""What an experiment asks of each host, derived by the planner and by nobody else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from miles_lite import build
from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.memory import PHASES, disk_items, host_items, on_node, sizes, total

WRITTEN = ("checkpoints", "HF export")  # of the disk items: what a run adds to what is there
TOKEN_BYTES = 16  # of an answer in Ray's store: id and log-prob, pickled
RANK_SHM = 64 << 20  # that NCCL or gloo of one process may take in /dev/shm


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one host, the fullest. The defaults: no experiment was named."""

    device: str = "any"  # cpu or cuda
    num_hosts: int = 1
    gpus: int = 0
    gpu_bytes: int = 0
    network_gbit: float = 0.0  # of all its devices to other hosts
    memory_bytes: int = 0
    shm_bytes: int = RANK_SHM
    rooms: Mapping[str, int] = field(default_factory=dict)  # bytes to be written by folder
    shared: tuple[str, ...] = ()  # folders that all hosts must see alike
    ports: tuple[int, int] | None = None  # first and last of a block that will be listened on

    @property
    def summary(self) -> str:
        per_host = f"{self.gpus} GPUs each" if self.gpus else f"on {self.device}"
        return f"{self.num_hosts} hosts, {per_host}"

    @classmethod
    def of(cls, cfg: Config, model: NemotronH) -> Needs:
        """Raises ConfigError for what can never run, and for hardware nobody knows."""
        rules.check(cfg, model)
        hardware, device = Hardware.named(cfg.cluster.hardware), build.device_of(cfg)
        cfg = replace(cfg, cluster=replace(cfg.cluster, device=device))
        planned = sizes(cfg, model, hardware)
        world, per_node = cfg.parallel.dims.world_size, hardware.devices_per_node
        hosts = [on_node(planned, rank) for rank in range(0, world, per_node)]
        devices = min(world, per_node)
        written = sum(item.num_bytes for item in disk_items(planned) if item.what in WRITTEN)
        shared = (str(cfg.model.path.absolute()),) if len(hosts) > 1 else ()
        return cls(
            device=device,
            num_hosts=len(hosts),
            gpus=devices if device == "cuda" else 0,
            gpu_bytes=int(hardware.facts.device_bytes),
            network_gbit=devices * hardware.facts.network_bytes_s * 8e-9,
            memory_bytes=max(
                total(host_items(planned, phase, *host)) for phase in PHASES for host in hosts
            ),
            shm_bytes=_stored_bytes(cfg, model) + devices * RANK_SHM,
            rooms={str(cfg.log.folder.absolute()): written},
            shared=shared,
        )


def _stored_bytes(cfg: Config, model: NemotronH) -> int:
    """In Ray's store at once: a step's answers of full length, as drawn and as ranks' shares."""
    tokens = cfg.rollout.num_samples * cfg.max_seq_len
    routing = 0
    if cfg.algo.routing_replay:
        routing = model.pattern.count("E") * model.top_k * (1 if model.num_experts <= 256 else 2)
    return 2 * tokens * (TOKEN_BYTES + routing)
