"""Each impossible combination is refused before anything starts, with names, values, a way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles_lite.config import ConfigError, compose
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner import rules

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
        (["train.global_batch=96"], r"256 samples .* train\.global_batch = 96"),
        (
            ["train.global_batch=1"],
            r"train\.global_batch = 1 is not a multiple of parallel\.dp = 2",
        ),
        (["rollout.samples_per_prompt=1", "train.global_batch=32"], r"samples_per_prompt = 1"),
        (["rollout.max_response_tokens=9000"], r"max_sequence_tokens = 4096"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.check(compose(["experiment=tiny", *overrides]), MODEL)


def test_lost_expert_gradients_are_refused_where_megatron_loses_them() -> None:
    """Tensor-parallel ranks with whole experts: silently wrong below megatron-core 0.19."""
    lossy = ParallelDims(tp=2, pp=1, dp=1, ep=1, expert_tp=1)
    with pytest.raises(ConfigError, match=r"parallel\.expert_tp = 2, or ep > 1"):
        rules.refuse_lost_expert_gradients(lossy, "0.16.1")
    rules.refuse_lost_expert_gradients(lossy, "0.19.2")
    for fine in (replace(lossy, expert_tp=2), replace(lossy, ep=2), replace(lossy, tp=1)):
        rules.refuse_lost_expert_gradients(fine, "0.16.1")
    with pytest.raises(ConfigError):
        rules.refuse_lost_expert_gradients(replace(lossy, tp=4, expert_tp=2), "0.18.0")
