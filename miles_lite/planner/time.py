"""Seconds of every phase of a step: a floor that no implementation beats, and an estimate.

The floor is the bytes or operations that a phase must move or do on its busiest device, at full
bandwidth or peak, all of it at once. The estimate adds what the assumptions of the hardware file
say: efficiencies, latencies, waiting in the pipeline, exchanges that nothing hides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log2

from miles_lite.algo.packing import PackSettings, pack
from miles_lite.models.flops import forward_flops, output_flops, train_flops
from miles_lite.planner.activations import recomputed
from miles_lite.planner.memory import (
    Sizes,
    disk_items,
    on_node,
    optimizer_bytes,
    running,
    total,
)
from miles_lite.planner.schedule import Timeline, simulate
from miles_lite.planner.shards import ELEMENT_BYTES, Stage
from miles_lite.planner.traffic import (
    Links,
    SyncTraffic,
    gradient_exchange,
    layer_exchange,
)
from miles_lite.types import Batch, TrainSequence


@dataclass(frozen=True, slots=True)
class PhaseTime:
    phase: str
    floor_s: float
    estimate_s: float
    parts: Mapping[str, float]  # of the estimate, in seconds
    links: Links  # bytes that the busiest device sends


@dataclass(frozen=True, slots=True)
class StepTime:
    phases: tuple[PhaseTime, ...]
    bubble: float  # share of the training time that stages wait
    num_micro_batches: int  # of all updates
    in_flight: tuple[int, ...]  # micro-batches that each stage holds at once
    num_tokens: int  # trained on
    save_s: float  # of one checkpoint; a step bears its share

    @property
    def floor_s(self) -> float:
        return sum(phase.floor_s for phase in self.phases)

    @property
    def estimate_s(self) -> float:
        return sum(phase.estimate_s for phase in self.phases)


def step_time(sizes: Sizes, sync: SyncTraffic) -> StepTime:
    batch = _batch(sizes)
    train, timelines = _train(sizes, batch)
    save_s, save = _save(sizes)
    waiting = sum(t.bubble * t.seconds for t in timelines)
    return StepTime(
        phases=(_generate(sizes), _score(sizes, batch), train, _sync(sizes, sync), save),
        bubble=waiting / sum(t.seconds for t in timelines),
        num_micro_batches=sum(update.num_micro_batches for update in batch.updates),
        in_flight=timelines[0].in_flight,
        num_tokens=sum(len(s.tokens) for s in batch.sequences),
        save_s=save_s,
    )


# ------------------------------------------------------------------ what is trained on


def _response_lens(sizes: Sizes) -> list[int]:
    """Of a step's samples: evenly spread around the assumed mean, in an order that is always the
    same, so that micro-batches come out as the packer of a run would make them."""
    cfg, share = sizes.cfg, sizes.hardware.assumed.mean_response_share
    low, high = max(0.0, 2 * share - 1), min(1.0, 2 * share)
    count, most = cfg.rollout.num_samples, cfg.rollout.max_response_tokens
    lens = [max(1, round(most * (low + (high - low) * (i + 1) / count))) for i in range(count)]
    random.Random(0).shuffle(lens)
    return lens


def _prompt_len(sizes: Sizes) -> int:
    wanted = int(sizes.hardware.assumed.mean_prompt_tokens)
    return max(1, min(wanted, sizes.cfg.data.max_prompt_tokens))


def _batch(sizes: Sizes) -> Batch:
    prompt_len = _prompt_len(sizes)
    sequences = [
        TrainSequence(
            tokens=(0,) * (prompt_len + response_len),
            prompt_len=prompt_len,
            logprobs=(),
            sample=index,
            group=0,
            reward=0.0,
            advantage=1.0,
            counts=True,
        )
        for index, response_len in enumerate(_response_lens(sizes))
    ]
    linear, pairs = _polynomial(partial(train_flops, sizes.model))
    cost = lambda n: linear * n + pairs * n * (n + 1) // 2  # noqa: E731
    return pack(sequences, PackSettings.of(sizes.cfg, cost))


def _polynomial(flops: Callable[[int], int]) -> tuple[int, int]:
    """(a, b) of a n + b n (n + 1) / 2 operations of n tokens; asked for once, not by sequence."""
    one, two = flops(1), flops(2)
    return 3 * one - two, two - 2 * one


def _passes(sizes: Sizes, batch: Batch) -> list[list[list[list[int]]]]:
    """Sequence lengths by [update][micro-batch][DP rank]."""
    return [
        [
            [[len(s.tokens) for s in rank[i].sequences] for rank in update.micro_batches]
            for i in range(update.num_micro_batches)
        ]
        for update in batch.updates
    ]


# ------------------------------------------------------------------ trainer


def _stage_flops(sizes: Sizes, stage: Stage, kinds: str) -> tuple[float, float]:
    """(a, b) of the forward operations a n + b n (n + 1) / 2 of n tokens: of the stage's layers of
    `kinds`, on the rank whose experts have most to do; with all kinds, the output layer too."""
    last = stage.index == sizes.cfg.parallel.pp - 1 and set(stage.pattern) <= set(kinds)
    model = replace(
        sizes.model,
        pattern="".join(kind for kind in stage.pattern if kind in kinds),
        vocab_size=sizes.model.vocab_size if last else 0,
    )
    without = replace(model, top_k=0)
    busy = sizes.hardware.assumed.expert_imbalance
    (a, b), (c, d) = (_polynomial(partial(forward_flops, m)) for m in (model, without))
    return busy * a - (busy - 1) * c, busy * b - (busy - 1) * d


def _exchange(sizes: Sizes, stage: Stage, num_tokens: int) -> Links:
    """Of one pass over a stage."""
    cfg, found = sizes.cfg, Links()
    width = ELEMENT_BYTES[cfg.model.dtype]
    for kind in set(stage.pattern):
        layer = layer_exchange(sizes.model, kind, cfg.parallel.dims, width, sizes.hardware)
        found += layer.times(stage.pattern.count(kind) * num_tokens)
    return found


def _hop_s(sizes: Sizes, num_tokens: float) -> float:
    """Hidden states of a micro-batch to the next stage."""
    dims, facts = sizes.cfg.parallel.dims, sizes.hardware.facts
    near = dims.world_size <= sizes.hardware.devices_per_node
    bandwidth = facts.nvlink_bytes_s if near else facts.network_bytes_s
    num_bytes = num_tokens / dims.tp * sizes.model.hidden_size
    num_bytes *= ELEMENT_BYTES[sizes.cfg.model.dtype]
    return num_bytes / bandwidth / sizes.hardware.assumed.link_efficiency


def _times(
    sizes: Sizes, passes: list[list[list[int]]], kinds: str, mfu: float
) -> tuple[list[list[float]], list[list[float]], list[list[Links]]]:
    """([stage][micro-batch] seconds of computing, the same of exchanges, bytes), forward."""
    speed = sizes.hardware.facts.flops * mfu * sizes.cfg.parallel.tp
    efficiency = sizes.hardware.assumed.link_efficiency
    computing, exchanging, links = [], [], []
    for stage in sizes.stages:
        # DP ranks meet in every exchange of experts: the slowest decides
        linear, pairs = _stage_flops(sizes, stage, kinds)
        flops = [
            max(sum(linear * n + pairs * n * (n + 1) / 2 for n in lens) for lens in ranks)
            for ranks in passes
        ]
        computing.append([each / speed for each in flops])
        moved = [_exchange(sizes, stage, max(sum(lens) for lens in ranks)) for ranks in passes]
        exchanging.append([each.seconds(sizes.hardware, efficiency) for each in moved])
        links.append(moved)
    return computing, exchanging, links


def _add(*tables: list[list[float]]) -> list[list[float]]:
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _scaled(table: list[list[float]], factor: float) -> list[list[float]]:
    return [[cell * factor for cell in row] for row in table]


def _busiest(tables: Sequence[list[list[Links]]], factor: float) -> Links:
    """Of the stage that sends most; tables by update."""
    stages = zip(*tables, strict=True)
    sums = [sum((each for rows in stage for each in rows), Links()) for stage in stages]
    return max(sums, key=lambda s: (s.network, s.nvlink)).times(factor)


def _score(sizes: Sizes, batch: Batch) -> PhaseTime:
    """Log-probs before the first update, unless its own pass tells them, and those of the
    reference."""
    assumed, all_kinds = sizes.hardware.assumed, sizes.model.pattern
    algo = sizes.cfg.algo
    times = (len(batch.updates) > 1 or algo.scores_first) + algo.needs_reference
    estimate = computing_s = exchange_s = 0.0
    tables = []
    for passes in _passes(sizes, batch):
        computing, exchanging, links = _times(sizes, passes, all_kinds, assumed.score_mfu)
        hop_s = _hop_s(sizes, _mean_tokens(passes))
        timeline = simulate(_add(computing, exchanging), None, hop_s)
        estimate += timeline.seconds
        computing_s += max(map(sum, computing))
        exchange_s += max(map(sum, exchanging))
        tables.append(links)
    parts = {"computing": computing_s, "exchanges": exchange_s}
    parts["pipeline"] = estimate - computing_s - exchange_s
    parts = {name: seconds * times for name, seconds in parts.items()}
    links = _busiest(tables, times)
    floor = max(_forward_floor(sizes, batch) * times, links.seconds(sizes.hardware))
    return PhaseTime("score", floor, estimate * times, parts, links)


def _forward_floor(sizes: Sizes, batch: Batch) -> float:
    """Of one forward pass over all samples: all devices at their peak, all the time. The tokens of
    prompts are not predicted."""
    linear, pairs = _polynomial(partial(forward_flops, sizes.model))
    lens = [len(s.tokens) for s in batch.sequences]
    flops = sum(linear * n + pairs * n * (n + 1) // 2 for n in lens)
    flops -= output_flops(sizes.model, sum(s.prompt_len for s in batch.sequences))
    return flops / sizes.hardware.facts.flops / sizes.cfg.parallel.dims.world_size


def _train(sizes: Sizes, batch: Batch) -> tuple[PhaseTime, list[Timeline]]:
    """All updates: forward and backward passes in the pipeline, gradients, optimizer."""
    cfg, hardware = sizes.cfg, sizes.hardware
    mfu, pattern = hardware.assumed.train_mfu, sizes.model.pattern
    again = {"all": pattern}.get(recomputed(cfg), recomputed(cfg))
    timelines, tables = [], []
    computing_s = exchange_s = 0.0
    for passes in _passes(sizes, batch):
        computing, exchanging, links = _times(sizes, passes, pattern, mfu)
        redone, _, _ = _times(sizes, passes, again, mfu)
        redo_exchange = float("E" in again or again == pattern)
        forward = _add(computing, exchanging)
        backward = _add(_scaled(computing, 2), redone, _scaled(exchanging, 1 + redo_exchange))
        timelines.append(simulate(forward, backward, _hop_s(sizes, _mean_tokens(passes))))
        computing_s += max(map(sum, _add(_scaled(computing, 3), redone)))
        exchange_s += max(map(sum, _scaled(exchanging, 2 + redo_exchange)))
        tables.append([[each.times(2 + redo_exchange) for each in row] for row in links])
    updates, links = len(batch.updates), _busiest(tables, 1.0)
    pipeline_s = sum(t.seconds for t in timelines)
    gradients = _gradients(sizes).times(updates)
    adam_floor, adam_s = (seconds * updates for seconds in _optimizer(sizes))
    enter = _moved(sizes, weights=True)
    efficiency = hardware.assumed.link_efficiency
    parts = {
        "computing": computing_s,
        "exchanges": exchange_s,
        "pipeline": pipeline_s - computing_s - exchange_s,
        "gradients": gradients.seconds(hardware, efficiency),
        "optimizer": adam_s,
        "entering": enter.seconds(hardware, efficiency) + hardware.assumed.phase_s,
    }
    links += gradients + enter
    # recomputing is a choice
    floor = max(3 * _forward_floor(sizes, batch) + adam_floor, links.seconds(hardware))
    return PhaseTime("train", floor, sum(parts.values()), parts, links), timelines


def _mean_tokens(passes: list[list[list[int]]]) -> float:
    return sum(max(sum(lens) for lens in ranks) for ranks in passes) / len(passes)


def _gradients(sizes: Sizes) -> Links:
    """Reduce-scatter of fp32 gradients and all-gather of weights in one update."""
    dims, found = sizes.cfg.parallel.dims, []
    for stage in sizes.stages:
        links = Links()
        for buffer in stage.buffers:
            is_dense = buffer.dp == dims.dp
            stride = dims.tp if is_dense else dims.expert_tp * dims.ep
            num_bytes = buffer.padded * (4 + buffer.element_bytes)
            links += gradient_exchange(num_bytes, buffer.dp, stride, sizes.hardware)
        found.append(links)
    return max(found, key=lambda links: (links.network, links.nvlink))


def _optimizer(sizes: Sizes) -> tuple[float, float]:
    """(floor, estimate) seconds of Adam: it reads weight, gradient and two moments in fp32, and
    writes three of them; on the host, gradients come down and masters go up before and after."""
    facts, touched = sizes.hardware.facts, 7 * 4
    if not sizes.cfg.optim.cpu_offload:
        most = max(stage.num_optimized for stage in sizes.stages)
        floor = touched * most / facts.device_bytes_s
        return floor, floor / sizes.hardware.assumed.decode_efficiency
    per_host = max(
        sum(stage.num_optimized for stage in on_node(sizes, rank)[0])
        for rank in range(0, sizes.cfg.parallel.dims.world_size, sizes.hardware.devices_per_node)
    )
    host_s = touched * per_host / sizes.hardware.assumed.host_bytes_s
    copied = Links(pcie=4 * max(stage.num_optimized for stage in sizes.stages))
    link_s = 2 * copied.seconds(sizes.hardware, sizes.hardware.assumed.link_efficiency)
    return max(host_s, copied.seconds(sizes.hardware)), host_s + link_s


def _moved(sizes: Sizes, weights: bool) -> Links:
    """Between device and host when a phase is entered: trainer state, with or without weights."""
    if sizes.on_cpu:
        return Links()
    most = max(
        optimizer_bytes(sizes, stage)[0] + stage.weight_bytes * weights for stage in sizes.stages
    )
    return Links(pcie=most)


# ------------------------------------------------------------------ engines


def _generate(sizes: Sizes) -> PhaseTime:
    """Decoding reads, every step, all weights that its tokens meet and all caches; steps last until
    the longest answer of each wave of requests ends."""
    cfg, hardware, engine = sizes.cfg, sizes.hardware, sizes.engine
    lens = sorted(_response_lens(sizes))
    groups = cfg.rollout.engine.num_engines * cfg.rollout.engine.dp
    share = ceil(cfg.rollout.num_samples / groups)
    at_once = max(1, min(running(cfg), engine.max_running))
    waves, longest = ceil(share / at_once), lens[-1]
    points, read_bytes = 64, 0.0
    for point in range(points):
        position = int(longest * (point + 0.5) / points)
        alive = at_once * sum(length > position for length in lens) / len(lens)
        read_bytes += longest / points * _decode_bytes(sizes, alive, position)
    read_bytes, steps = read_bytes * waves, longest * waves
    prompt_len = _prompt_len(sizes)
    prompt = forward_flops(sizes.model, prompt_len) - output_flops(sizes.model, prompt_len - 1)
    prompts = prompt * cfg.rollout.num_prompts
    speed = hardware.facts.flops * cfg.rollout.engine.num_engines * cfg.rollout.engine.tp
    out = _moved(sizes, weights=True)
    floor = read_bytes / hardware.facts.device_bytes_s
    parts = {
        "reading memory": floor / hardware.assumed.decode_efficiency,
        "collectives": steps * _hops(sizes) * hardware.assumed.collective_s,
        "scheduling": steps * hardware.assumed.engine_step_s,
        "prompts": prompts / speed / hardware.assumed.score_mfu,
        "entering": out.seconds(hardware, hardware.assumed.link_efficiency)
        + hardware.assumed.phase_s,
    }
    return PhaseTime("generate", floor, sum(parts.values()), parts, out)


def _decode_bytes(sizes: Sizes, alive: float, position: int) -> float:
    """What one engine rank reads and writes for the next token of `alive` sequences a group."""
    cfg, model, engine = sizes.cfg, sizes.model, sizes.engine
    width, dims = ELEMENT_BYTES[cfg.model.dtype], cfg.rollout.engine.dims
    experts = model.pattern.count("E") * model.num_experts * 2 * model.expert_width
    expert_bytes = experts * model.expert_ffn_size * width / dims.tp
    table = model.vocab_size // dims.attn_tp * model.hidden_size * width  # a row of it is read
    dense = engine.weight_bytes - expert_bytes - table
    tokens = alive * dims.dp
    met = 1 - (1 - model.top_k / model.num_experts) ** tokens if model.num_experts else 0.0
    caches = engine.kv_token_bytes * (position + _prompt_len(sizes)) + 2 * engine.state_bytes
    return dense + met * expert_bytes + alive * caches


def _hops(sizes: Sizes) -> float:
    """Of all collectives of an engine in one decode step, each as deep as a tree of its ranks."""
    dims, pattern = sizes.cfg.rollout.engine.dims, sizes.model.pattern
    cut = sum(pattern.count(kind) for kind in "M*-") + 2  # and both ends
    return cut * log2(dims.attn_tp) + 2 * pattern.count("E") * log2(dims.tp)


def _sync(sizes: Sizes, sync: SyncTraffic) -> PhaseTime:
    hardware = sizes.hardware
    enter = _moved(sizes, weights=False)
    efficiency = hardware.assumed.link_efficiency
    parts = {
        "sending": sync.busiest.seconds(hardware, efficiency),
        "entering": enter.seconds(hardware, efficiency) + hardware.assumed.phase_s,
    }
    links = sync.busiest + enter
    return PhaseTime("sync", sync.busiest.seconds(hardware), sum(parts.values()), parts, links)


def _save(sizes: Sizes) -> tuple[float, PhaseTime]:
    """(seconds of one checkpoint, a step's share of it)."""
    checkpoints = [item for item in disk_items(sizes) if item.what == "checkpoints"]
    num_bytes = total(checkpoints) / (sizes.cfg.checkpoint.keep + 1)
    seconds, every = num_bytes / sizes.hardware.assumed.disk_bytes_s, sizes.cfg.checkpoint.every
    share = 1 / every if every else 0.0
    estimate = seconds / sizes.hardware.assumed.link_efficiency
    parts = {"writing": estimate * share}
    return estimate, PhaseTime("save", seconds * share, estimate * share, parts, Links())
