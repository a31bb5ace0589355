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
from miles_lite.trainer.megatron.limits import refuse_lost_expert_gradients

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
