"""Bytes of every party in every phase, on devices, hosts and disk.

Weights, gradients, optimizer state and caches are exact, activations an estimate, margins are
assumptions of the hardware file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner.activations import layer_bytes, recomputed
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.shards import ELEMENT_BYTES, Stage, engine_size, stages, stored_numel
from miles_lite.rollout.sglang.options import EngineSpec, options

PHASES = ("generate", "score", "train", "sync", "save")


@dataclass(frozen=True, slots=True)
class Item:
    party: str  # trainer, rollout or machine
    what: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Engine:
    """One rank of an engine."""

    num_params: int
    weight_bytes: int
    pool_bytes: int  # for caches
    kv_token_bytes: int  # keys and values of a token, all layers
    state_bytes: int  # of a sequence, whatever its length
    prefill_bytes: int  # activations of reading prompts
    max_running: int  # sequences at once in a DP group, of the longest

    def sequence_bytes(self, num_tokens: int) -> int:
        return self.kv_token_bytes * num_tokens + self.state_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """All that is held, by whom; what `items` sorts by phase and place."""

    cfg: Config
    model: NemotronH
    hardware: Hardware
    stages: tuple[Stage, ...]
    engine: Engine

    @property
    def on_cpu(self) -> bool:
        """Devices are the host: weights and optimizer stay, and nothing is copied off."""
        return self.cfg.cluster.device == "cpu"


def sizes(cfg: Config, model: NemotronH, hardware: Hardware) -> Sizes:
    found = stages(model, cfg.parallel.dims, cfg.model.dtype)
    return Sizes(cfg, model, hardware, found, _engine(cfg, model, hardware))


def longest(cfg: Config) -> int:
    """Tokens of the longest sequence that prompt and answer allow."""
    return cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens


# ------------------------------------------------------------------ engines


def _engine(cfg: Config, model: NemotronH, hardware: Hardware) -> Engine:
    engine, width = cfg.rollout.engine, ELEMENT_BYTES[cfg.model.dtype]
    parts = engine.dims.attn_tp
    num_params, weight_bytes = engine_size(cfg, model)
    kv_heads = max(1, model.num_kv_heads // parts)
    kv = model.pattern.count("*") * 2 * kv_heads * model.head_dim * width
    ssm = model.mamba_inner_size * model.ssm_state_size * 4
    conv = (model.conv_kernel - 1) * (model.mamba_inner_size + 2 * model.mamba_bc_size) * width
    state = model.pattern.count("M") * (ssm + conv) // parts
    per_sequence = kv * cfg.max_seq_len + state
    if engine.backend == "sglang":
        pool = max(0, int(mem_fraction(cfg) * hardware.facts.device_bytes) - weight_bytes)
    else:
        pool = engine.max_running * per_sequence
    dims = ParallelDims(tp=parts, pp=1, dp=engine.dp, ep=engine.ep, expert_tp=engine.dims.expert_tp)
    prefill = max(
        sum(layer_bytes(model, kind, engine.prefill_tokens, dims, hardware, width))
        for kind in set(model.pattern)
    )
    running = min(engine.max_running, pool // per_sequence)
    return Engine(num_params, weight_bytes, pool, kv, state, prefill, running)


def mem_fraction(cfg: Config) -> float:
    """Share of a device that SGLang takes for weights and caches."""
    return options(EngineSpec.of(cfg, cfg.model.path, "cuda"))["mem_fraction_static"]


# ------------------------------------------------------------------ activations of the trainer


def activations(sizes: Sizes, stage: Stage, tokens: int) -> tuple[int, int]:
    """(saved by all micro-batches in flight, work of the layer at hand) of an update."""
    cfg, model, dims = sizes.cfg, sizes.model, sizes.cfg.parallel.dims
    width, kept_input = ELEMENT_BYTES[cfg.model.dtype], recomputed(sizes.cfg)
    hidden = ceil(tokens / dims.tp) * model.hidden_size * width
    saved = work = 0
    for kind in set(stage.pattern):
        full, beside = layer_bytes(model, kind, tokens, dims, sizes.hardware, width)
        count = stage.pattern.count(kind)
        if kept_input == "all":
            kept = hidden
        elif kind in kept_input:
            kept = 2 * hidden
        else:
            kept = full
        saved += count * kept
        # gradients of the layer's tensors beside them, and themselves when made again
        work = max(work, 2 * full - kept + beside)
    in_flight = min(dims.pp - stage.index, cfg.train.global_batch // dims.dp)
    return saved * in_flight, work + 2 * hidden * (dims.pp > 1)


def logits_bytes(sizes: Sizes, stage: Stage, tokens: int, backward: bool) -> int:
    """Of the last stage: hidden states of all responses, logits of a chunk, gradients."""
    cfg, model, dims = sizes.cfg, sizes.model, sizes.cfg.parallel.dims
    if stage.index != dims.pp - 1:
        return 0
    width = ELEMENT_BYTES[cfg.model.dtype]
    chunk, rows = min(cfg.train.logprob_chunk_tokens, tokens), model.vocab_size // dims.tp
    hidden = tokens * model.hidden_size * width
    if not backward:  # logits as computed, in fp32, their exponentials
        return 2 * hidden + chunk * rows * (width + 2 * 4)
    # gathered, chosen, its gradient; logits, p, gradient, entropy's in fp32, two in the model's
    weight = rows * model.hidden_size * (4 + width)
    return 3 * hidden + chunk * rows * (4 * 4 + 2 * width) + weight


# ------------------------------------------------------------------ phases


def optimizer_bytes(sizes: Sizes, stage: Stage) -> tuple[int, int]:
    """(device, host) bytes of a rank. On a CPU both are the host's.

    Adam keeps two fp32 values a parameter, and a master of a rounded one. Offloaded, the masters
    stay where they were, and host copies of all parameters and gradients come on top.
    """
    masters = 4 * stage.num_rounded
    if sizes.cfg.optim.cpu_offload:
        return masters, 16 * stage.num_optimized
    return masters + 8 * stage.num_optimized, 0


def device_items(sizes: Sizes, phase: str, stage: Stage, has_engine: bool) -> list[Item]:
    """What one device holds while a phase is at its fullest."""
    cfg, assumed, on_cpu = sizes.cfg, sizes.hardware.assumed, sizes.on_cpu
    tokens = cfg.train.max_tokens_per_micro_batch
    engine, trains = sizes.engine, phase in ("score", "train")
    items = [
        Item("machine", "lost to fragmentation", int(assumed.fragmentation * _room(sizes))),
        Item("trainer", "context", int(assumed.trainer_context_bytes)),
    ]
    if on_cpu or phase != "generate":
        items.append(Item("trainer", "weights", stage.weight_bytes))
    if on_cpu or trains or phase == "save":
        items.append(Item("trainer", "optimizer", optimizer_bytes(sizes, stage)[0]))
    if trains:
        items.append(Item("trainer", "grads", stage.grad_bytes))
    if phase == "train":
        saved, work = activations(sizes, stage, tokens)
        items += [Item("trainer", "activations", saved), Item("trainer", "layer at work", work)]
    if phase == "score":
        width, dims = ELEMENT_BYTES[cfg.model.dtype], cfg.parallel.dims
        layers = [
            sum(layer_bytes(sizes.model, kind, tokens, dims, sizes.hardware, width))
            for kind in set(stage.pattern)
        ]
        items.append(Item("trainer", "layer at work", max(layers)))
    if trains:
        logits = logits_bytes(sizes, stage, tokens, phase == "train")
        items.append(Item("trainer", "logits", logits))
    if phase in ("sync", "save"):
        items.append(Item("trainer", "sync buckets", 2 * cfg.sync.bucket_bytes))
    if has_engine:
        items.append(Item("rollout", "context", int(assumed.engine_context_bytes)))
        if on_cpu or not trains:
            items.append(Item("rollout", "weights", engine.weight_bytes))
        if phase == "generate":
            items += [
                Item("rollout", "cache", engine.pool_bytes),
                Item("rollout", "prefill", engine.prefill_bytes),
                Item("rollout", "graphs", int(assumed.graph_bytes)),
            ]
    return [item for item in items if item.num_bytes]


def host_items(sizes: Sizes, phase: str, node: Sequence[Stage], num_engines: int) -> list[Item]:
    """What a host holds whose devices are ranks of the stages `node`; `num_engines` of them have an
    engine rank."""
    cfg = sizes.cfg
    found = {("machine", "system, Ray, graders"): int(sizes.hardware.assumed.host_reserved_bytes)}

    def add(what: str, num_bytes: int, party: str = "trainer") -> None:
        found[party, what] = found.get((party, what), 0) + num_bytes

    for index, stage in enumerate(node):
        device, host = optimizer_bytes(sizes, stage)
        add("optimizer", host)
        if cfg.algo.needs_reference:
            add("reference", stage.weight_bytes)
        if sizes.on_cpu:
            for item in device_items(sizes, phase, stage, index < num_engines):
                if item.party != "machine":
                    add(item.what, item.num_bytes, item.party)
            continue
        add("weights", stage.weight_bytes)  # pinned once, for good
        if not cfg.optim.cpu_offload:  # else the masters go where their copies are
            add("optimizer of the device", device)
        if phase == "save":
            add("checkpoint on its way", stage.weight_bytes + device)
    return [Item(party, what, n) for (party, what), n in found.items() if n]


def disk_items(sizes: Sizes) -> list[Item]:
    """On the file system that all hosts see, at the fullest moment of a run."""
    cfg, model = sizes.cfg, sizes.model
    width = ELEMENT_BYTES[cfg.model.dtype]
    num_main, num_mtp = stored_numel(model)
    num_all = num_main + num_mtp
    copies = 3 if width < 4 else 2  # Adam's two, and the master of a rounded weight
    checkpoint = num_main * (width + 4 * copies + width * cfg.algo.needs_reference)
    return [
        Item("rollout", "HF checkpoint", num_all * width),
        Item("trainer", "torch_dist, if converted", num_all * width),
        Item("trainer", "checkpoints", checkpoint * (cfg.checkpoint.keep + 1)),
        Item("trainer", "HF export", num_all * width),
    ]


# ------------------------------------------------------------------ what does not fit


@dataclass(frozen=True, slots=True)
class Shortage:
    phase: str
    where: str  # rank or host
    missing: int  # bytes
    needed: int
    there: int

    def __str__(self) -> str:
        return (
            f"phase {self.phase}, {self.where}: {self.missing / 1e9:,.1f} GB missing "
            f"({self.needed / 1e9:,.1f} GB needed, {self.there / 1e9:,.1f} GB there)"
        )


def _room(sizes: Sizes) -> int:
    return int(sizes.hardware.facts.device_bytes)


def shortages(sizes: Sizes) -> list[Shortage]:
    """Everything that does not fit, the largest lack first. [] if the plan fits."""
    found = []
    dims = sizes.cfg.parallel.dims
    for phase in PHASES:
        for stage, ranks, has_engine in roles(sizes):
            needed = total(device_items(sizes, phase, stage, has_engine))
            where = f"ranks {ranks.start} to {ranks.stop - 1} (stage {stage.index})"
            found.append((phase, where, needed, _room(sizes)))
        for node in range(0, dims.world_size, sizes.hardware.devices_per_node):
            needed = total(host_items(sizes, phase, *on_node(sizes, node)))
            where = f"host {node // sizes.hardware.devices_per_node}"
            found.append((phase, where, needed, int(sizes.hardware.assumed.host_bytes)))
    disk = total(disk_items(sizes))
    found.append(("save", "shared disk", disk, int(sizes.hardware.assumed.disk_bytes)))
    lacks = [
        Shortage(phase, where, needed - there, needed, there)
        for phase, where, needed, there in found
        if needed > there
    ]
    engine = sizes.engine
    if engine.max_running < 1:
        one = engine.sequence_bytes(longest(sizes.cfg))
        needed, there = engine.weight_bytes + one, engine.weight_bytes + engine.pool_bytes
        if engine.pool_bytes == 0:
            there = int(mem_fraction(sizes.cfg) * sizes.hardware.facts.device_bytes)
        where = f"engine ranks (one sequence of {longest(sizes.cfg):,} tokens)"
        lacks.append(Shortage("generate", where, needed - there, needed, there))
    return sorted(lacks, key=lambda lack: -lack.missing)


def roles(sizes: Sizes) -> list[tuple[Stage, range, bool]]:
    """(stage, its ranks, has it an engine) of devices that hold alike."""
    cfg, found = sizes.cfg, []
    per_stage = cfg.parallel.tp * cfg.parallel.dp
    served = cfg.rollout.engine.num_engines * cfg.rollout.engine.tp
    for stage in sizes.stages:
        first, last = stage.index * per_stage, (stage.index + 1) * per_stage
        edge = min(max(served, first), last)
        found += [
            (stage, ranks, ranks.start < served)
            for ranks in (range(first, edge), range(edge, last))
            if ranks
        ]
    return found


def on_node(sizes: Sizes, first_rank: int) -> tuple[list[Stage], int]:
    """The stages of the ranks of a host, and how many of them have an engine."""
    dims, engine = sizes.cfg.parallel.dims, sizes.cfg.rollout.engine
    last = min(first_rank + sizes.hardware.devices_per_node, dims.world_size)
    node = [sizes.stages[dims.pp_rank(rank)] for rank in range(first_rank, last)]
    return node, min(max(engine.num_engines * engine.tp - first_rank, 0), len(node))


def total(items: Sequence[Item]) -> int:
    return sum(item.num_bytes for item in items)


def longest_that_fits(sizes: Sizes) -> tuple[int, int]:
    """(tokens of a micro-batch that trains, tokens of a sequence that the engines hold with all
    samples of a step running at once), each with all else as it is."""
    cfg, engine = sizes.cfg, sizes.engine

    def trains(tokens: int) -> bool:
        longer = replace(cfg, train=replace(cfg.train, max_tokens_per_micro_batch=tokens))
        grown = replace(sizes, cfg=longer)
        return all(
            total(device_items(grown, phase, stage, has_engine)) <= _room(sizes)
            for phase in ("score", "train")
            for stage, _, has_engine in roles(sizes)
        )

    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    room = engine.pool_bytes // running(cfg) - engine.state_bytes
    return low, max(0, room) // engine.kv_token_bytes if engine.kv_token_bytes else 1 << 24


def running(cfg: Config) -> int:
    """Sequences at once in a DP group of an engine."""
    engine = cfg.rollout.engine
    return min(engine.max_running, ceil(cfg.rollout.num_samples / (engine.num_engines * engine.dp)))


def held(sizes: Sizes) -> Mapping[str, int]:
    """Bytes by the names under which a run measures them, summed over ranks (cluster/lease.py)."""
    found: dict[str, int] = {}
    for phase in ("generate", "train", "sync"):
        for party, kinds in (
            ("trainer", ("weights", "grads", "optimizer")),
            ("rollout", ("weights", "cache")),
        ):
            found |= {f"memory/{phase}/{party}_{kind}_bytes": 0 for kind in kinds}
        for stage, ranks, has_engine in roles(sizes):
            for item in device_items(sizes, phase, stage, has_engine):
                if (name := f"memory/{phase}/{item.party}_{item.what}_bytes") in found:
                    found[name] += item.num_bytes * len(ranks)
    return found
