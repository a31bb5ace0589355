"""Counts of parameters and bytes: published figures, the fine weight table, live optimizers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from miles_lite.compose import CONFIGS, compose
from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.planner import shards
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.memory import device_items, held, optimizer_bytes, roles, sizes
from miles_lite.planner.plan import num_params
from miles_lite.rollout import layout
from miles_lite.weights.plan import sync_plan
from miles_lite.weights.table import hf_tensors, iter_segments, trainer_layout
from tests.trainer.ranks import World, run_ranks

TINY = NemotronH.from_folder(CONFIGS / "model/tiny")
ULTRA = NemotronH.from_folder(CONFIGS / "model/nemotron3_ultra")


def model(name: str) -> NemotronH:
    return NemotronH.from_folder(CONFIGS / f"model/nemotron3_{name}")


@pytest.mark.parametrize(
    ("name", "total", "mtp"),
    [
        ("ultra", 549_308_968_960, 11.216),
        ("super", 120_668_687_360, 2.942),
        ("nano_30b", 31_577_937_344, 0.0),
        ("nano_4b", 3_973_556_832, 0.0),
    ],
)
def test_published_totals(name: str, total: int, mtp: float) -> None:
    assert num_params(model(name)) == total
    assert shards.stored_numel(model(name))[1] / 1e9 == pytest.approx(mtp, abs=1e-3)


def test_ultra_on_128_devices_by_rank() -> None:
    """TP8 PP4 EP32: stages, experts and state as worked out by hand."""
    dims = ParallelDims(tp=8, pp=4, dp=4, ep=32, expert_tp=1)
    first, second, third, last = shards.stages(ULTRA, dims, "bf16")
    assert [round(s.num_params / 1e9, 4) for s in (first, second, third, last)] == [
        5.55,
        5.4158,
        5.4158,
        5.55,
    ]
    assert first.num_expert_params == 4_026_531_840
    assert {s.pattern.count("M") for s in (first, second, third, last)} == {12}
    assert sum(s.num_params for s in (first, second, third, last)) * 32 == 701_806_952_448
    assert first.weight_bytes / 1e9 == pytest.approx(11.10, abs=0.005)
    assert first.grad_bytes / 1e9 == pytest.approx(22.20, abs=0.005)
    assert 12 * first.num_optimized / 1e9 == pytest.approx(52.9, abs=0.05)
    assert 8 * 16 * first.num_optimized / 1e9 == pytest.approx(564, abs=1)


@pytest.mark.parametrize(
    ("options", "billions"), [({}, 21.10), ({"moe_a2a_backend": "deepep"}, 28.90)]
)
def test_ultra_engine_rank(options: dict[str, Any], billions: float) -> None:
    """Shared experts over all 32 ranks; whole on each of them with an all-to-all back-end."""
    cfg = compose(["experiment=nemotron3_ultra"])
    engine = replace(cfg.rollout.engine, sglang=options)
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine=engine))
    found, num_bytes = shards.engine_size(cfg, ULTRA)
    assert found / 1e9 == pytest.approx(billions, abs=0.006)
    assert num_bytes == pytest.approx(2 * found, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kv_token", "kv_and_state_mb"),
    [
        ("ultra", 6144, 101.3),
        ("super", 4096, 54.9),
        ("nano_30b", 3072, 31.3),
        ("nano_4b", 2048, 27.3),
    ],
)
def test_caches_of_a_sequence_at_attention_over_8(
    name: str, kv_token: int, kv_and_state_mb: float
) -> None:
    cfg = compose(["experiment=nemotron3_ultra"])
    ep = 32 if "4b" not in name else 1
    engine = replace(cfg.rollout.engine, ep=ep)
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine=engine))
    chosen = model(name)
    with_experts = cfg if "4b" not in name else replace(cfg, parallel=replace(cfg.parallel, ep=1))
    hardware = Hardware.named("h200")
    if chosen.num_layers % 4:
        with_experts = replace(with_experts, parallel=replace(with_experts.parallel, pp=1))
    found = sizes(with_experts, chosen, hardware).engine
    assert found.kv_token_bytes == kv_token
    assert found.sequence_bytes(8192) / 1e6 == pytest.approx(kv_and_state_mb, abs=0.1)


# ------------------------------------------------------------------ against the fine table


LAYOUTS = [
    (ParallelDims(1, 1, 1, 1, 1), EngineDims(1, 1, 1)),
    (ParallelDims(2, 2, 2, 2, 2), EngineDims(2, 1, 1)),
    (ParallelDims(2, 4, 1, 2, 1), EngineDims(4, 2, 4)),
    (ParallelDims(1, 2, 4, 4, 1), EngineDims(2, 2, 2)),
]


@pytest.mark.parametrize(("dims", "engine"), LAYOUTS, ids=str)
def test_merging_experts_changes_no_size(dims: ParallelDims, engine: EngineDims) -> None:
    tensors = hf_tensors(TINY)
    for stage in shards.stages(TINY, dims, "bf16"):
        numel = 0
        for hosted in trainer_layout(TINY, dims, stage.index * dims.tp * dims.dp):
            for name, _, _, count in iter_segments(hosted):
                if not hosted.param.endswith("expert_bias"):
                    numel += count * tensors[name].numel // tensors[name].shape[hosted.dim]
        assert stage.num_params == numel
    cfg = compose(["experiment=tiny"])
    chosen = replace(cfg.rollout.engine, num_engines=1, tp=engine.tp, dp=engine.dp, ep=engine.ep)
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine=chosen))
    expected = sum(4 * _numel(param.shape) for param in layout.params(TINY, engine, 0))
    assert shards.engine_size(cfg, TINY)[1] == expected


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tp=2", "parallel.pp=2", "rollout.engine.num_engines=2"],
        ["parallel.tp=2", "parallel.ep=4", "rollout.engine.num_engines=2", "rollout.engine.dp=1"],
    ],
)
def test_a_sync_moves_the_bytes_of_the_plan_of_a_run(overrides: list[str]) -> None:
    """In all, and from each rank's own device; only who of equals sends may differ."""
    cfg = compose(["experiment=tiny", *overrides])
    dims, engine = cfg.parallel.dims, cfg.rollout.engine
    targets = [
        [hosted for param in layout.params(TINY, engine.dims, rank) for hosted in param.hosted]
        for _ in range(engine.num_engines)
        for rank in range(engine.tp)
    ]
    routes = sync_plan(
        hf_tensors(TINY),
        [trainer_layout(TINY, dims, rank) for rank in range(dims.world_size)],
        targets,
        home=range(len(targets)),
        element_bytes=4,
        bucket_bytes=1 << 20,
    )
    flows = shards.sync_flows(cfg, TINY)
    for target in range(len(targets)):
        assert sum(n for (_, t), n in flows.items() if t == target) == sum(
            route.num_bytes for route in routes if route.target == target
        )
        local = sum(r.num_bytes for r in routes if r.source == r.target == target)
        assert flows.get((target, target), 0) == local


# ------------------------------------------------------------------ against live optimizers


def _held(world: World, cfg: Config) -> dict[str, int]:
    """What a rank's Megatron buffers and optimizer take after one step."""
    import torch

    from miles_lite.trainer.megatron.model import build_model, transformer_config

    with world.layout(cfg.parallel.dims):
        from miles_lite.trainer.megatron import memory, optimizer
        from miles_lite.trainer.megatron.worker import DTYPES

        dtype = DTYPES[cfg.model.dtype]
        config = transformer_config(TINY, cfg.parallel.dims, dtype, {})
        ddp: Any = optimizer.wrap_ddp(build_model(TINY, config))
        adam = optimizer.Optimizer(ddp, cfg.optim, dtype)
        for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
            buffer.grad_data.normal_()
        adam.step()
        return memory.DeviceMemory(ddp, torch.device("cpu"), adam.storages).held_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True])
def test_live_optimizers_hold_what_is_planned(dtype: str, offload: bool) -> None:
    """To the byte, summed over ranks, at TP2 DP2 EP2 and PP2 DP2 EP2."""
    for layout_ in (["parallel.tp=2"], ["parallel.pp=2"]):
        cfg = compose(
            ["experiment=tiny", *layout_, f"model.dtype={dtype}", f"optim.cpu_offload={offload}"]
        )
        found = run_ranks(4, _held, cfg)
        measured = {
            f"memory/train/trainer_{what}_bytes": sum(rank[what] for rank in found)
            for what in ("weights", "grads", "optimizer")
        }
        planned = sizes(cfg, TINY, Hardware.named("laptop"))
        expected = {name: held(planned)[name] for name in measured}
        # `held` has what lies on the device; on a CPU the host's part lies there too
        assert planned.on_cpu and device_items(planned, "train", planned.stages[0], True)
        expected["memory/train/trainer_optimizer_bytes"] += sum(
            optimizer_bytes(planned, stage)[1] * len(ranks) for stage, ranks, _ in roles(planned)
        )
        assert measured == expected
