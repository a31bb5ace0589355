"""What a run will need and take, as one value: derived before anything is rented, JSON-able."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles_lite.config import Config, ConfigError
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.memory import (
    PHASES,
    Item,
    Shortage,
    Sizes,
    device_items,
    disk_items,
    held,
    host_items,
    longest_that_fits,
    on_node,
    roles,
    running,
    shortages,
    sizes,
    total,
)
from miles_lite.planner.shards import Coarse, sync_flows
from miles_lite.planner.time import StepTime, step_time
from miles_lite.planner.traffic import SyncTraffic, sync_traffic
from miles_lite.protocols import Metrics


@dataclass(frozen=True, slots=True)
class Role:
    """Devices that hold the same."""

    stage: int
    pattern: str
    ranks: tuple[int, int]  # first and last
    num_params: int
    num_expert_params: int
    device: Mapping[str, Sequence[Item]]  # by phase


@dataclass(frozen=True, slots=True)
class EnginePlan:
    num_engines: int
    num_params: int  # of a rank
    weight_bytes: int
    pool_bytes: int
    kv_token_bytes: int
    state_bytes: int
    longest_sequence_bytes: int
    running: int  # sequences at once in a DP group, as the batch and max_running want
    capacity: int  # full-length sequences that a DP group has room for


@dataclass(frozen=True, slots=True)
class Plan:
    experiment: str
    num_devices: int
    num_hosts: int
    hardware: Hardware
    num_params: int
    roles: tuple[Role, ...]
    host: Mapping[str, Sequence[Item]]  # of the fullest, by phase
    disk: Sequence[Item]
    engine: EnginePlan
    sync: SyncTraffic
    step: StepTime
    num_steps: int
    longest_trained: int  # tokens of a micro-batch that fit
    longest_generated: int  # tokens of a sequence
    shortages: tuple[Shortage, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.shortages

    def as_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["fits"] = self.fits
        plain["step"] |= {"floor_s": self.step.floor_s, "estimate_s": self.step.estimate_s}
        return plain


def read_model(cfg: Config) -> tuple[NemotronH, list[str]]:
    """The model's sizes from its folder or, where that is not there, from the config that is
    shipped; with what is worth saying about it."""
    shipped = NemotronH.from_folder(cfg.model.plan_path) if cfg.model.plan_path else None
    if not (cfg.model.path / "config.json").is_file():
        if shipped is None:
            raise ConfigError(
                f"model.path = {cfg.model.path} has no config.json: give the HF folder, or "
                "model.plan_path=FOLDER with its config.json to plan without the weights"
            )
        return shipped, [f"{cfg.model.path} is not there: planned by the sizes shipped"]
    found, said = NemotronH.from_folder(cfg.model.path), []
    if shipped is not None:
        said = [
            f"{cfg.model.path}: {field.name} = {getattr(found, field.name)}, not "
            f"{getattr(shipped, field.name)} as shipped: planned by the checkpoint's"
            for field in dataclasses.fields(found)
            if getattr(found, field.name) != getattr(shipped, field.name)
        ]
    return found, said


def make_plan(cfg: Config, model: NemotronH, hardware: Hardware) -> Plan:
    """Raises ConfigError for what can never run, whatever the memory."""
    rules.check(cfg, model)
    rules.check_hosts(cfg, hardware)
    return plan_of(sizes(cfg, model, hardware))


def plan_of(measured: Sizes) -> Plan:
    cfg, model, hardware = measured.cfg, measured.model, measured.hardware
    world, per_node = cfg.parallel.dims.world_size, hardware.devices_per_node
    lacks = shortages(measured)
    sync = sync_traffic(sync_flows(cfg, model), hardware)
    engine = measured.engine
    trained, generated = longest_that_fits(measured)
    hosts = [on_node(measured, rank) for rank in range(0, world, per_node)]
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    return Plan(
        experiment=cfg.experiment,
        num_devices=world,
        num_hosts=len(hosts),
        hardware=hardware,
        num_params=num_params(model),
        roles=tuple(
            Role(
                stage=stage.index,
                pattern=stage.pattern,
                ranks=(ranks.start, ranks.stop - 1),
                num_params=stage.num_params,
                num_expert_params=stage.num_expert_params,
                device={p: device_items(measured, p, stage, has_engine) for p in PHASES},
            )
            for stage, ranks, has_engine in roles(measured)
        ),
        host={
            phase: max((host_items(measured, phase, *host) for host in hosts), key=total)
            for phase in PHASES
        },
        disk=disk_items(measured),
        engine=EnginePlan(
            num_engines=cfg.rollout.engine.num_engines,
            num_params=engine.num_params,
            weight_bytes=engine.weight_bytes,
            pool_bytes=engine.pool_bytes,
            kv_token_bytes=engine.kv_token_bytes,
            state_bytes=engine.state_bytes,
            longest_sequence_bytes=engine.sequence_bytes(longest),
            running=running(cfg),
            capacity=engine.pool_bytes // engine.sequence_bytes(longest),
        ),
        sync=sync,
        step=step_time(measured, sync),
        num_steps=cfg.train.num_steps,
        longest_trained=trained,
        longest_generated=generated,
        shortages=tuple(lacks),
        warnings=tuple(rules.warnings(cfg) + rules.plan_warnings(cfg, model, hardware)),
    )


def num_params(model: NemotronH) -> int:
    """Of the whole model, without MTP; the routers' correction bias is a buffer."""
    tensors = Coarse.of(model, 1).tensors
    return sum(t.numel for name, t in tensors.items() if not name.endswith("correction_bias"))


def with_devices(cfg: Config, num_devices: int) -> Config:
    """The same layout on another number of devices: more or fewer data-parallel ranks and engines.

    Raises ConfigError when the layout has no such size.
    """
    dims, engine = cfg.parallel.dims, cfg.rollout.engine
    per_replica = dims.tp * dims.pp
    if num_devices % per_replica or num_devices % engine.tp:
        raise ConfigError(
            f"{num_devices} devices are no multiple of parallel.tp x pp = {dims.tp} x {dims.pp} "
            f"and of rollout.engine.tp = {engine.tp}: choose other sizes, or let --search find them"
        )
    return replace(
        cfg,
        parallel=replace(cfg.parallel, dp=num_devices // per_replica),
        rollout=replace(cfg.rollout, engine=replace(engine, num_engines=num_devices // engine.tp)),
    )


def planned_step(cfg: Config, model: NemotronH) -> tuple[Sizes, StepTime]:
    """On the hardware that the configuration names."""
    planned = sizes(cfg, model, Hardware.named(cfg.cluster.hardware))
    return planned, step_time(planned, sync_traffic(sync_flows(cfg, model), planned.hardware))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run should measure, under its own metric names."""

    num_bytes: Mapping[str, int]  # exact
    seconds: Mapping[str, float]  # estimates

    @classmethod
    def of(cls, cfg: Config, model: NemotronH) -> Expected:
        planned, step = planned_step(cfg, model)
        times = {phase.phase: phase.estimate_s for phase in step.phases}
        seconds = {
            "perf/rollout_time": times["generate"],
            "perf/train_time": times["score"] + times["train"],
            "perf/update_weights_time": times["sync"],
            "perf/step_time": step.estimate_s - times["save"],
        }
        return cls(held(planned), seconds)

    def against(self, measured: Metrics) -> Metrics:
        """plan/...: measured over planned. Where nothing is planned, the bytes measured."""
        bytes_ = {
            f"plan/{name}": measured[name] / max(1, planned)
            for name, planned in self.num_bytes.items()
            if name in measured
        }
        times = {
            f"plan/{name}": measured[name] / planned
            for name, planned in self.seconds.items()
            if name in measured
        }
        return bytes_ | times
