"""Layouts that fit, by estimated step time, and the smallest change that makes one fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from miles_lite.config import Config, ConfigError, EngineConfig, ParallelConfig
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.memory import Sizes, longest, shortages, sizes
from miles_lite.planner.shards import sync_flows
from miles_lite.planner.time import step_time
from miles_lite.planner.traffic import Links, SyncTraffic, sync_traffic

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Layout:
    changes: tuple[str, ...]  # overrides that lead there
    step_s: float  # estimate


def search(cfg: Config, model: NemotronH, hardware: Hardware, count: int = 10) -> list[Layout]:
    """The `count` fastest layouts that fit on as many devices, trainer and engines.

    Trainer layouts are ranked with the engines as they are, engines with the trainer as it is; the
    best of both are then planned together.
    """
    trainers = _fastest(cfg, model, hardware, list(_trainers(cfg, model)), 8)
    engines = _fastest(cfg, model, hardware, list(_engines(cfg, model)), 4)
    pairs = [
        replace(a, rollout=replace(a.rollout, engine=b.rollout.engine))
        for a in trainers
        for b in engines
    ]
    chosen = _fastest(cfg, model, hardware, pairs, count)
    best = [
        Layout(changes(cfg, pair), _step_s(found, exact=True))
        for pair in [*chosen, *([] if cfg in chosen else [cfg])]
        if (found := _fitting(pair, model, hardware))
    ]
    return sorted(best, key=lambda layout: layout.step_s)


def _fastest(
    cfg: Config, model: NemotronH, hardware: Hardware, candidates: list[Config], count: int
) -> list[Config]:
    """Of those that fit; of none of them, when none does, as they were given."""
    timed = [
        (_step_s(found, exact=False), candidate)
        for candidate in candidates
        if (found := _fitting(candidate, model, hardware))
    ]
    timed.sort(key=lambda pair: pair[0])
    return [candidate for _, candidate in timed[:count]] or [cfg]


def _fitting(cfg: Config, model: NemotronH, hardware: Hardware) -> Sizes | None:
    try:
        rules.check(cfg, model)
        rules.check_hosts(cfg, hardware)
    except ConfigError:
        return None
    found = sizes(cfg, model, hardware)
    return None if shortages(found) else found


def _step_s(found: Sizes, exact: bool) -> float:
    """Not exact: with every byte of a sync over the network, as when nothing lies well."""
    if exact:
        traffic = sync_traffic(sync_flows(found.cfg, found.model), found.hardware)
    else:
        traffic = SyncTraffic(0, 0, 0, 0, Links(network=found.engine.weight_bytes))
    return step_time(found, traffic).estimate_s


def _trainers(cfg: Config, model: NemotronH) -> Iterator[Config]:
    world = cfg.parallel.dims.world_size
    for tp in _divisors(world):
        for pp in _divisors(world // tp):
            dp = world // tp // pp
            if model.num_layers % pp or cfg.train.global_batch % dp or tp > 64:
                continue
            for ep in _divisors(tp * dp) if model.num_experts else [1]:
                for expert_tp in {1, tp} if ep == 1 else {1}:
                    yield replace(
                        cfg,
                        parallel=ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep, expert_tp=expert_tp),
                    )


def _engines(cfg: Config, model: NemotronH) -> Iterator[Config]:
    world = cfg.parallel.dims.world_size
    for tp in _divisors(world):
        for dp in _divisors(tp):
            for ep in {1, tp} if model.num_experts else {1}:
                engine = replace(cfg.rollout.engine, num_engines=world // tp, tp=tp, dp=dp, ep=ep)
                yield replace(cfg, rollout=replace(cfg.rollout, engine=engine))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


# ------------------------------------------------------------------ the smallest change


def smallest_change(cfg: Config, model: NemotronH, hardware: Hardware) -> Layout | None:
    """The fewest keys that make the run fit, on the same devices; of equal ones the fastest.

    First settings that leave what is learnt alone, then layouts, then shorter answers.
    """
    for candidates in (_settings(cfg), _trainers(cfg, model), _engines(cfg, model)):
        found = [
            Layout(changes(cfg, other), _step_s(fits, exact=False))
            for other in candidates
            if other != cfg and (fits := _fitting(other, model, hardware))
        ]
        if found:
            return min(found, key=lambda layout: (len(layout.changes), layout.step_s))
    pairs = [layout for layout in search(cfg, model, hardware, 3) if layout.changes]
    if pairs:
        return min(pairs, key=lambda layout: len(layout.changes))
    for tenths in range(9, 0, -1):
        shorter = max(1, cfg.rollout.max_response_tokens * tenths // 10)
        other = replace(cfg, rollout=replace(cfg.rollout, max_response_tokens=shorter))
        if found := _fitting(other, model, hardware):
            return Layout(changes(cfg, other), _step_s(found, exact=False))
    return None


def _settings(cfg: Config) -> Iterator[Config]:
    train, engine = cfg.train, cfg.rollout.engine
    yield replace(cfg, train=replace(train, megatron={**train.megatron, **RECOMPUTE}))
    yield replace(cfg, optim=replace(cfg.optim, cpu_offload=not cfg.optim.cpu_offload))
    yield replace(cfg, train=replace(train, max_tokens_per_micro_batch=longest(cfg)))
    chunk = min(128, train.logprob_chunk_tokens)
    yield replace(cfg, train=replace(train, logprob_chunk_tokens=chunk))
    yield replace(cfg, checkpoint=replace(cfg.checkpoint, keep=1))
    for percent in (90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 2, 1):
        fewer = max(1, engine.max_running * percent // 100)
        yield _with_engine(cfg, replace(engine, max_running=fewer))
        if engine.backend == "sglang":
            options = {**engine.sglang, "mem_fraction_static": percent / 100}
            yield _with_engine(cfg, replace(engine, sglang=options))


def _with_engine(cfg: Config, engine: EngineConfig) -> Config:
    return replace(cfg, rollout=replace(cfg.rollout, engine=engine))


def changes(cfg: Config, other: Config) -> tuple[str, ...]:
    """Overrides that make `other` of `cfg`."""
    pairs = (
        ("parallel", cfg.parallel, other.parallel),
        ("optim", cfg.optim, other.optim),
        ("train", cfg.train, other.train),
        ("checkpoint", cfg.checkpoint, other.checkpoint),
        ("rollout", cfg.rollout, other.rollout),
        ("rollout.engine", cfg.rollout.engine, other.rollout.engine),
    )
    found = []
    for section, old, new in pairs:
        for name in old.__dataclass_fields__:
            before, after = getattr(old, name), getattr(new, name)
            if before == after or name == "engine":
                continue
            if isinstance(after, dict):
                found += [
                    f"{section}.{name}.{key}={value}"
                    for key, value in after.items()
                    if before.get(key) != value
                ]
            else:
                found.append(f"{section}.{name}={str(after).lower()}")
    return tuple(found)
