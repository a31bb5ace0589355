"""Each impossible combination is refused before anything starts, with names, values, a way out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from miles_lite.compose import compose
from miles_lite.config import ConfigError
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner import rules
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.plan import read_model
from miles_lite.trainer.megatron.limits import refuse_lost_expert_gradients

H200 = Hardware.named("h200")
TINY = compose(["experiment=tiny"])
MODEL = NemotronH.from_folder(TINY.model.path)


def test_the_shipped_experiment_passes() -> None:
    rules.check(TINY, MODEL)


@pytest.mark.parametrize(
    "overrides",
    [["parallel.tp=2"], ["parallel.pp=2"], ["parallel.tp=2", "parallel.pp=2"], ["parallel.ep=1"]],
)
def test_layouts_that_work_pass(overrides: list[str]) -> None:
    rules.check(compose(["experiment=tiny", *overrides]), MODEL)


def test_without_experts_there_is_no_routing_to_replay() -> None:
    dense = replace(MODEL, pattern=MODEL.pattern.replace("E", "-"), dense_ffn_size=96)
    replaying = compose(
        ["experiment=tiny", "algo.routing_replay=true", "parallel.ep=1", "rollout.engine.ep=1"]
    )
    rules.check(replaying, MODEL)
    with pytest.raises(ConfigError, match=r"routing_replay = true, but the model has no experts"):
        rules.check(replaying, dense)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp=4"], r"parallel\.tp = 4 .* 2 Mamba groups .* 1, 2"),
        (["parallel.pp=3"], r"parallel\.pp = 3 .* layers of the pattern"),
        (["parallel.dp=3", "parallel.ep=3"], r"parallel\.ep = 3 .* 8 experts"),
        (["parallel.ep=8"], r"parallel\.ep x expert_tp = 8 x 1 .* 2 ranks"),
        (["parallel.dp=1", "parallel.ep=1"], r"rollout\.engine\.num_engines x tp = 1 x 2"),
        (["rollout.engine.num_engines=2"], r"2 x 2 processes, but the trainer has 2 devices"),
        (
            ["train.global_batch=1"],
            r"train\.global_batch = 1 is not a multiple of parallel\.dp = 2",
        ),
        (["rollout.max_response_tokens=9000"], r"= 9064 tokens do not fit .*batch = 4096"),
        (["rollout.over_sampling=64"], r"over_sampling = 64 without rollout\.dynamic_sampling"),
        (
            ["rollout.dynamic_sampling=true", "rollout.over_sampling=8"],
            r"over_sampling = 8 prompts .* rollout\.num_prompts = 32",
        ),
        (["algo.overlong_buffer=24"], r"overlong_buffer = 24 .*max_response_tokens = 24"),
        (
            ["rollout.samples_per_prompt=1", "train.global_batch=32"],
            r"samples_per_prompt = 1 with algo\.advantage_estimator = grpo",
        ),
        (["algo.advantage_estimator=reinforce_plus_plus"], r"algo\.whiten=true"),
        (
            [
                "algo.advantage_estimator=reinforce_plus_plus",
                "algo.whiten=true",
                "rollout.samples_per_prompt=1",
                "train.global_batch=32",
                "rollout.dynamic_sampling=true",
            ],
            r"dynamic_sampling with rollout\.samples_per_prompt = 1",
        ),
        (
            ["algo.train_zero_advantage=false", "algo.entropy_coef=0.01"],
            r"train_zero_advantage = false with algo\.entropy_coef = 0\.01",
        ),
        (
            ["algo.kl_coef=0.1", "algo.kl_loss_coef=0.2"],
            r"kl_coef = 0\.1 and algo\.kl_loss_coef = 0\.2",
        ),
        (["algo=rloo", "algo.overlong_filter=true"], r"overlong_filter with algo\.kl_coef = 0\.03"),
        (["algo.ref_update_interval=3"], r"ref_update_interval = 3 without a reference"),
        (["algo.use_unbiased_kl=true"], r"kl_loss_coef = 0"),
        (
            ["algo.old_logprobs=rollout", "algo.correction.weight=token"],
            r"old_logprobs = rollout with algo\.correction",
        ),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.check(compose(["experiment=tiny", *overrides]), MODEL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.kl_loss_coef=0.1", "algo.kl_loss_type=k1"], "k1 .* mean zero"),
        (["algo.correction.weight=token", "rollout.top_p=0.9"], r"top_p = 0\.9"),
        (["rollout.top_k=20"], r"top_k = 20: .* truncated"),
        (["algo.old_logprobs=rollout"], "not the trainer's own"),
    ],
)
def test_what_works_but_is_seldom_meant_is_said(overrides: list[str], message: str) -> None:
    cfg = compose(["experiment=tiny", *overrides])
    rules.check(cfg, MODEL)
    (warning,) = rules.warnings(cfg)
    assert re.search(message, warning)
    assert rules.warnings(TINY) == []


def test_lost_expert_gradients_are_refused_where_megatron_loses_them() -> None:
    """Tensor-parallel ranks with whole experts: silently wrong below megatron-core 0.19."""
    lossy = ParallelDims(tp=2, pp=1, dp=1, ep=1, expert_tp=1)
    with pytest.raises(ConfigError, match=r"parallel\.expert_tp = 2, or ep > 1"):
        refuse_lost_expert_gradients(lossy, "0.16.1")
    refuse_lost_expert_gradients(lossy, "0.19.2")
    for fine in (replace(lossy, expert_tp=2), replace(lossy, ep=2), replace(lossy, tp=1)):
        refuse_lost_expert_gradients(fine, "0.16.1")
    with pytest.raises(ConfigError):
        refuse_lost_expert_gradients(replace(lossy, tp=4, expert_tp=2), "0.18.0")


# ------------------------------------------------------------------ layouts of the large models


def planned_refusal(overrides: list[str]) -> str:
    """What the plan refuses a layout with, before it looks at memory."""
    with pytest.raises(ConfigError) as caught:
        cfg = compose(overrides)
        model = read_model(cfg)[0]
        rules.check(cfg, model)
        rules.check_hosts(cfg, H200)
    return str(caught.value)


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        (
            "ultra",
            "parallel.tp=16 parallel.dp=2",
            r"parallel\.tp = 16 .* 8 Mamba groups .* 1, 2, 4, 8",
        ),
        ("ultra", "parallel.tp=3", r"parallel\.tp = 3 does not divide the 8 Mamba groups"),
        ("ultra", "parallel.pp=8 parallel.dp=2", r"parallel\.pp = 8 .* 108 layers .* 1, 2, 3, 4"),
        ("ultra", "parallel.ep=24", r"parallel\.ep = 24 does not divide the 512 experts"),
        ("ultra", "parallel.ep=64", r"ep x expert_tp = 64 x 1 .* 32 ranks .*tp x dp = 8 x 4"),
        ("ultra", "parallel.expert_tp=3 parallel.ep=8", r"expert_tp = 3 .* 5120 expert width"),
        ("ultra", "parallel.expert_tp=8", r"ep x expert_tp = 32 x 8 does not divide the 32 ranks"),
        ("ultra", "parallel.ep=1", r"would lose expert gradients.*expert_tp = 8, or ep > 1"),
        ("ultra", "parallel.pp=2", r"4 x 32 processes, but the trainer has 64 devices"),
        (
            "ultra",
            "rollout.engine.dp=1",
            r"engine\.tp / dp = 32 does not divide the 8 Mamba groups",
        ),
        ("ultra", "rollout.engine.dp=3", r"dp = 3 does not divide tp = 32"),
        ("ultra", "rollout.engine.ep=24", r"ep = 24 does not divide tp = 32"),
        (
            "ultra",
            "rollout.engine.tp=12 rollout.engine.dp=3 rollout.engine.ep=12",
            r"engine\.ep = 12 does not divide the 512 experts",
        ),
        (
            "ultra",
            "rollout.engine.tp=24 rollout.engine.dp=3 rollout.engine.ep=8",
            r"rollout\.engine\.tp / ep = 3 does not divide the 5120 expert width",
        ),
        (
            "nano_4b",
            "rollout.engine.tp=6 rollout.engine.dp=6 rollout.engine.num_engines=1",
            r"rollout\.engine\.tp = 6 does not divide the 131072 vocabulary",
        ),
        (
            "nano_4b",
            "parallel.dp=5 train.global_batch=140 rollout.num_prompts=35",
            r"10 devices .* hosts of 8: take 8 or 16",
        ),
        (
            "ultra",
            "train.global_batch=126 rollout.num_prompts=63 rollout.samples_per_prompt=2",
            r"global_batch = 126 is not a multiple of parallel\.dp = 4",
        ),
        ("ultra", "train.updates_per_step=3", r"32.*8.*128.*3.*does not hold"),
        ("ultra", "train.max_tokens_per_micro_batch=8192", r"= 10240 tokens do not fit .* = 8192"),
        (
            "ultra",
            "train.megatron.recompute_num_layers=null",
            r"recompute_num_layers = None: set them to uniform and 1",
        ),
        ("ultra", "train.megatron.recompute_method=null", r"recompute_method = None"),
        ("nano_4b", "parallel.ep=4", r"parallel\.ep = 4 but the model has no experts"),
        (
            "nano_4b",
            "rollout.engine.ep=2 rollout.engine.tp=2 rollout.engine.num_engines=4",
            r"rollout\.engine\.ep = 2 but the model has no experts",
        ),
        (
            "nano_4b",
            "parallel.pp=4 parallel.tp=2 parallel.dp=1",
            r"pp = 4 .* 42 layers .* 1, 2, 3, 6",
        ),
        ("nano_30b", "parallel.pp=3", r"parallel\.pp = 3 does not divide the 52 layers"),
        ("super", "parallel.ep=48", r"parallel\.ep = 48 does not divide the 512 experts"),
    ],
)
def test_impossible_layouts_of_the_family(experiment: str, overrides: str, message: str) -> None:
    words = [f"experiment=nemotron3_{experiment}", *overrides.split()]
    assert re.search(message, planned_refusal(words), re.S)


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("ultra", "rollout.engine.num_engines=3", "32 of 128 devices have no engine"),
        ("ultra", "rollout.engine.max_running=4", r"16 samples .*max_running = 4: .* 4 waves"),
        (
            "ultra_4layer",
            "parallel.pp=4 parallel.dp=2 parallel.ep=2",
            r"stage \d has \d\.\d\d times the mean work",
        ),
    ],
)
def test_layouts_that_waste(experiment: str, overrides: str, message: str) -> None:
    cfg = compose([f"experiment=nemotron3_{experiment}", *overrides.split()])
    model = read_model(cfg)[0]
    rules.check(cfg, model)
    (warning,) = rules.plan_warnings(cfg, model, H200)
    assert re.search(message, warning)
