"""The megatron model against transformers: same log-probs, same gradients, in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron import cpu_compat, forward, model
from miles_lite.types import MicroBatch
from miles_lite.weights.hf import HfCheckpoint
from miles_lite.weights.table import trainer_layout
from tests.trainer.conftest import TEMPERATURE, Tiny, loss
from tests.trainer.ranks import World, run_ranks

ONE = ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1)
CPU = torch.device("cpu")
CHUNK = 16


def dims(tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1, expert_tp: int = 1) -> ParallelDims:
    return ParallelDims(tp=tp, pp=pp, dp=dp, ep=ep, expert_tp=expert_tp)


def load(
    folder: Path,
    layout: ParallelDims,
    rank: int,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] = {},  # noqa: B006
    **fields: Any,
) -> nn.Module:
    """The checkpoint's model on this rank; `fields` of the NemotronH are replaced."""
    sizes = NemotronH.from_folder(folder)
    config = model.transformer_config(
        dataclasses.replace(sizes, **fields),
        layout,
        dtype,
        {"calculate_per_token_loss": True, **options},
    )
    module = model.build_model(dataclasses.replace(sizes, **fields), config)
    checkpoint, weights = HfCheckpoint(folder), model.named_weights(module)
    with torch.no_grad():
        for hosted in trainer_layout(sizes, layout, rank):
            weights.pop(hosted.param).copy_(checkpoint.read_hosted(hosted))
    assert not weights, f"the table does not fill {list(weights)}"
    return module


# ---- every layout


@dataclasses.dataclass
class Errors:
    """Largest of one rank's differences to transformers."""

    logprob: float = 0.0
    entropy: float = 0.0
    grad: float = 0.0  # relative to the largest element of each gradient
    worst: str = ""  # gradient

    def see_outputs(self, got: list[Tensor], expected: list[Tensor]) -> None:
        for a, b in zip(got, expected, strict=True):
            self.logprob = max(self.logprob, (a - b)[0].abs().max().item())
            self.entropy = max(self.entropy, (a - b)[1].abs().max().item())

    def see_grad(self, name: str, got: Tensor, expected: Tensor) -> None:
        error = ((got - expected).abs().max() / (expected.abs().max() + 1e-8)).item()
        if error > self.grad:
            self.grad, self.worst = error, name


def _run_schedule(
    ddp: nn.Module, mine: list[MicroBatch], num_micro_batches: int, tp: int, forward_only: bool
) -> list[Tensor]:
    """Megatron's own pipeline schedule; outputs of the micro-batches, at the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(batches: Iterator[MicroBatch], stage: nn.Module) -> Any:
        micro_batch = next(batches)
        inputs = forward.packed(micro_batch, tp, CPU)

        def finish(out: Tensor) -> Any:
            # one "token" a micro-batch: megatron then divides by num_micro_batches over DP
            value = loss(out, micro_batch, num_micro_batches) * num_micro_batches
            return value, torch.ones((), dtype=torch.int), {"out": out.detach().clone()}

        return forward.forward_step(stage, inputs, TEMPERATURE, CHUNK), finish

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(mine),
        model=[ddp],
        num_microbatches=len(mine),
        seq_length=1,  # shapes travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [output["out"] for output in outputs]


def _compare(
    world: World, tiny: Tiny, layouts: list[ParallelDims], options: dict[str, Any]
) -> list[Errors]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    found = []
    for layout in layouts:
        with world.layout(layout):
            module = load(tiny.folder, layout, world.rank, options=options).train()
            module.config.finalize_model_grads_func = finalize_model_grads
            ddp = DistributedDataParallel(
                module.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module
            )
            mine = slice(layout.dp_rank(world.rank), None, layout.dp)
            expected = tiny.expected[mine] if module.post_process else []
            errors = Errors()
            for forward_only in (True, False):
                with torch.no_grad() if forward_only else nullcontext():
                    outputs = _run_schedule(
                        ddp, tiny.micro_batches[mine], len(tiny.expected), layout.tp, forward_only
                    )
                errors.see_outputs(outputs, expected)
            grads, weights = HfCheckpoint(tiny.grads), model.named_weights(ddp)
            for hosted in trainer_layout(NemotronH.from_folder(tiny.folder), layout, world.rank):
                if isinstance(weights[hosted.param], nn.Parameter):
                    got = weights[hosted.param].main_grad
                    errors.see_grad(hosted.param, got, grads.read_hosted(hosted))
            found.append(errors)
    return found


def _check_layouts(tiny: Tiny, layouts: list[ParallelDims], **options: Any) -> None:
    by_rank = run_ranks(layouts[0].world_size, _compare, tiny, layouts, options)
    for layout, all_errors in zip(layouts, zip(*by_rank, strict=True), strict=True):
        logprob = max(errors.logprob for errors in all_errors)
        entropy = max(errors.entropy for errors in all_errors)
        worst = max(all_errors, key=lambda errors: errors.grad)
        print(
            f"{layout}: log-prob {logprob:.1e}, entropy {entropy:.1e}, "
            f"gradient {worst.grad:.1e} ({worst.worst})"
        )
        assert logprob < 2e-5 and entropy < 2e-5, layout
        assert worst.grad < 1e-4, (layout, worst)


def test_one_rank(tiny: Tiny) -> None:
    _check_layouts(tiny, [ONE])


def test_two_ranks(tiny: Tiny) -> None:
    _check_layouts(
        tiny,
        [
            dims(tp=2, expert_tp=2),
            dims(tp=2, ep=2),
            dims(pp=2),
            dims(dp=2),
            dims(dp=2, ep=2),
        ],
    )


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_full_recompute_has_the_same_gradients(tiny: Tiny) -> None:
    _check_layouts(tiny, [dims(tp=2, ep=2), dims(pp=2)], **RECOMPUTE)


def _saved_bytes(world: World, tiny: Tiny, options: dict[str, Any]) -> int:
    """What the layers' graphs hold of a forward pass, weights aside."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with world.layout(ONE):
        module = load(tiny.folder, ONE, 0, options=options).train()
        inputs = forward.packed(tiny.micro_batches[1], 1, CPU)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward.forward_step(module, inputs, TEMPERATURE, CHUNK)
        assert out.requires_grad
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(num_bytes for pointer, num_bytes in saved.items() if pointer not in weights)


def _all_saved_bytes(world: World, tiny: Tiny, each: list[dict[str, Any]]) -> list[int]:
    return [_saved_bytes(world, tiny, options) for options in each]


def test_full_recompute_saves_no_activations_of_layers(tiny: Tiny) -> None:
    """Left are the output layer's and the last norm's; of `block`, the layers not chosen too."""
    first = RECOMPUTE | {"recompute_method": "block", "recompute_num_layers": 4}
    ((whole, half, rest),) = run_ranks(1, _all_saved_bytes, tiny, [{}, first, RECOMPUTE])
    hidden_bytes = 70 * NemotronH.from_folder(tiny.folder).hidden_size * 4
    assert rest < 12 * hidden_bytes < half < whole / 2


@pytest.mark.slow
def test_four_ranks(tiny: Tiny) -> None:
    """TP 4 cuts each of 2 KV heads over two ranks."""
    _check_layouts(
        tiny,
        [
            dims(tp=4, expert_tp=4),
            dims(tp=2, dp=2, ep=2, expert_tp=2),
            dims(tp=2, dp=2, ep=4),
            dims(tp=2, pp=2, ep=2),
            dims(pp=2, dp=2, ep=2),
            dims(pp=4),
        ],
    )


@pytest.mark.slow
def test_eight_ranks(tiny: Tiny) -> None:
    _check_layouts(tiny, [dims(tp=2, pp=2, dp=2, ep=2), dims(tp=2, pp=2, dp=2, ep=2, expert_tp=2)])


# ---- the config, without any process group


@pytest.fixture(scope="module")
def sizes(tiny: Tiny) -> NemotronH:
    cpu_compat.install()
    return NemotronH.from_folder(tiny.folder)


def test_config_says_what_the_model_says(sizes: NemotronH) -> None:
    config = model.transformer_config(sizes, dims(tp=2, ep=2, dp=2), torch.bfloat16, {})
    assert config.moe_router_topk_scaling_factor == 2.5
    assert config.moe_router_bias_update_rate == 0.0
    assert config.moe_router_dtype == "fp32" and config.moe_latent_size == 24
    assert config.sequence_parallel and config.variable_seq_lengths
    assert config.expert_tensor_parallel_size == 1
    assert config.bf16 and config.pipeline_dtype is torch.bfloat16
    assert config.hidden_dropout == config.attention_dropout == 0.0


def test_overrides(sizes: NemotronH) -> None:
    def make(**overrides: Any) -> Any:
        return model.transformer_config(sizes, ONE, torch.float32, overrides)

    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    assert make(**recompute).recompute_modules == ["moe"]
    assert make(moe_router_topk=3).moe_router_topk == 3  # says what the model says
    assert make(attention_backend="unfused").attention_backend.name == "unfused"
    with pytest.raises(ValueError, match=r"recompute_granularty.*did you mean recompute_granul"):
        make(recompute_granularty="full")
    with pytest.raises(ValueError, match=r"moe_router_topk = 4 contradicts 3"):
        make(moe_router_topk=4)
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size = 2 contradicts 1"):
        make(tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"attention_backend = 'fancy' is not one of"):
        make(attention_backend="fancy")


@pytest.mark.parametrize(
    ("field", "value"), [("norm_eps", 1e-6), ("norm_topk_prob", False), ("top_k", 1)]
)
def test_models_megatron_would_compute_differently(
    sizes: NemotronH, field: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=field):
        model.transformer_config(
            dataclasses.replace(sizes, **{field: value}), ONE, torch.float32, {}
        )


def test_stages_must_be_equal(sizes: NemotronH) -> None:
    with pytest.raises(ValueError, match="pp = 3 does not divide the 8 layers"):
        model.transformer_config(sizes, dims(pp=3), torch.float32, {})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mixer.conv1d_weight", "mixer.conv1d.weight"),
        ("mixer.conv1d.bias", "mixer.conv1d.bias"),
        ("mixer.in_proj.layer_norm_weight", "norm.weight"),
        ("mixer.norm.weight", "mixer.norm.weight"),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.linear_fc2.weight11", "mlp.experts.local_experts.11.linear_fc2.weight"),
        ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight"),
    ],
)
def test_canonical_name(theirs: str, ours: str) -> None:
    assert model.canonical_name(f"decoder.layers.3.{theirs}") == f"decoder.layers.3.{ours}"
