"""Packing, and what would go wrong: leaks between sequences, lost facts of the model, rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.trainer.megatron import forward, model, stand_ins
from miles_lite.types import MicroBatch, TrainSequence
from miles_lite.weights.table import trainer_layout
from tests.trainer.conftest import TEMPERATURE, Tiny, loss
from tests.trainer.ranks import World, run_ranks
from tests.trainer.test_model import CHUNK, CPU, ONE, dims, load


def _sequence(tokens: tuple[int, ...], prompt_len: int) -> TrainSequence:
    logprobs = (0.0,) * (len(tokens) - prompt_len)
    return TrainSequence(
        tokens, prompt_len, logprobs, sample=0, group=0, reward=0.0, advantage=0.0, counts=True
    )


# ---- packing


def test_packed() -> None:
    sequences = (_sequence((5, 6, 7), 1), _sequence((8, 9), 2), _sequence((1, 2, 3, 4), 3))
    inputs = forward.packed(MicroBatch(sequences, (1.0,) * 3), 4, CPU)
    assert inputs.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 0, 0, 0]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert inputs.loss_positions.tolist() == [0, 1, 7]
    assert inputs.targets.tolist() == [6, 7, 4]
    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 9, 12]
    assert inputs.cu_seqlens.dtype is torch.int32 and inputs.max_len == 4


def test_packed_without_padding() -> None:
    inputs = forward.packed(MicroBatch((_sequence((5, 6, 7, 8), 2),), (1.0,)), 2, CPU)
    assert inputs.cu_seqlens.tolist() == [0, 4] and inputs.targets.tolist() == [7, 8]


def test_packed_of_nothing_is_padding() -> None:
    inputs = forward.packed(MicroBatch((), ()), 2, CPU)
    assert inputs.tokens.tolist() == [[0, 0]] and inputs.targets.numel() == 0
    assert inputs.cu_seqlens.tolist() == [0, 2]


@pytest.mark.parametrize("lens", [[3], [4, 4, 4], [1, 2, 3], [1, 100, 7, 1, 64, 65], [30] * 50])
def test_unpacking_is_the_inverse(lens: list[int]) -> None:
    packed = torch.randn(sum(lens), 3, requires_grad=True)
    unpacking = stand_ins.Unpacking.of(lens)
    assert torch.equal(unpacking.apply(lambda x: x, packed), packed)

    def by_sequence(x: Tensor) -> Tensor:
        return torch.cat([piece.cumsum(0) for piece in x.split(lens)])

    out = unpacking.apply(lambda x: x.cumsum(1), packed)
    torch.testing.assert_close(out, by_sequence(packed), rtol=0, atol=1e-5)
    grad = torch.autograd.grad(out.square().sum(), packed)[0]
    expected = torch.autograd.grad(by_sequence(packed).square().sum(), packed)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    computed = sum(batch.tokens.numel() for batch in unpacking.batches)
    assert computed <= 2 * sum(lens), "padding more than doubles the work"


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_scan_is_the_recurrence(chunk: int) -> None:
    torch.manual_seed(0)
    N, L, H, P, G, S = 2, 19, 4, 3, 2, 5
    x, dt = torch.randn(N, L, H, P), torch.randn(N, L, H)
    A, D, bias = -torch.rand(H) * 4, torch.randn(H), torch.randn(H)
    B, C = torch.randn(N, L, G, S), torch.randn(N, L, G, S)
    state, expected = torch.zeros(N, H, P, S), []
    for t in range(L):
        step = torch.nn.functional.softplus(dt[:, t] + bias)
        b, c = (v[:, t].repeat_interleave(H // G, dim=1) for v in (B, C))  # N H S
        state = state * (step * A).exp()[..., None, None]
        state = state + (step[..., None] * x[:, t])[..., None] * b[:, :, None]
        expected.append((state * c[:, :, None]).sum(-1) + D[:, None] * x[:, t])
    got = stand_ins.mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, dt_bias=bias)
    torch.testing.assert_close(got, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


# ---- one process, many questions: each answers with its largest log-prob error


def _logprobs(module: nn.Module, micro_batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        inputs = forward.packed(micro_batch, 1, CPU)
        return forward.forward_step(module, inputs, TEMPERATURE, CHUNK)


def _error(module: nn.Module, tiny: Tiny) -> float:
    pairs = zip(tiny.micro_batches, tiny.expected, strict=True)
    return max((_logprobs(module, m)[0] - want[0]).abs().max().item() for m, want in pairs)


@contextmanager
def _mamba_leaks() -> Iterator[None]:
    from megatron.core.ssm import mamba_mixer

    good = mamba_mixer.mamba_split_conv1d_scan_combined

    def leaking(*args: Any, seq_idx: Any = None, **kwargs: Any) -> Any:
        return good(*args, **kwargs)

    mamba_mixer.mamba_split_conv1d_scan_combined = leaking
    try:
        yield
    finally:
        mamba_mixer.mamba_split_conv1d_scan_combined = good


@contextmanager
def _attention_leaks() -> Iterator[None]:
    good = stand_ins.TorchAttention.forward

    def leaking(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._attend(q[None], k[None], v[None]).transpose(0, 1)

    stand_ins.TorchAttention.forward = leaking
    try:
        yield
    finally:
        stand_ins.TorchAttention.forward = good


def _errors_of_one(world: World, tiny: Tiny) -> dict[str, float]:
    with world.layout(ONE):
        module = load(tiny.folder, ONE, 0).eval()
        found = {"as it is": _error(module, tiny)}
        alone = []
        for micro_batch in tiny.micro_batches:
            packed = _logprobs(module, micro_batch)
            singles = [
                _logprobs(module, MicroBatch((sequence,), (1.0,)))
                for sequence in micro_batch.sequences
            ]
            alone.append((packed - torch.cat(singles, dim=1)).abs().max().item())
        found["packed or not"] = max(alone)
        with _mamba_leaks():
            found["mamba leaks"] = _error(module, tiny)
        with _attention_leaks():
            found["attention leaks"] = _error(module, tiny)
        for name, value in (("routed_scaling_factor", 1.0), ("top_k", 2)):
            found[name] = _error(load(tiny.folder, ONE, 0, **{name: value}).eval(), tiny)
        for buffer in ("router.expert_bias", "mixer.D", "mixer.dt_bias"):
            changed = load(tiny.folder, ONE, 0).eval()
            for name, tensor in model.named_weights(changed).items():
                if name.endswith(buffer):
                    tensor.data.zero_()
            found[buffer] = _error(changed, tiny)
        return found


def test_right_and_wrong(tiny: Tiny) -> None:
    """Every error a test above might miss does move log-probs far more than the tolerance."""
    (errors,) = run_ranks(1, _errors_of_one, tiny)
    print(errors)
    assert errors.pop("as it is") < 2e-5
    assert errors.pop("packed or not") < 1e-5
    for what, error in errors.items():
        assert error > 1e-2, f"{what}: nothing notices"


# ---- other shapes of model


def _unlike_tiny(world: World, tiny: Tiny) -> dict[str, Any]:
    """Names of the live model and of the table, for models without experts or latent width."""
    found: dict[str, Any] = {}
    sizes = NemotronH.from_folder(tiny.folder)
    variants = {
        "dense": dict(pattern="M-*", num_experts=0, top_k=0, expert_ffn_size=0, latent_size=0),
        "no latent": dict(latent_size=0),
        "one group": dict(mamba_num_groups=1, num_kv_heads=1),
    }
    with world.layout(ONE):
        for name, changes in variants.items():
            changed = dataclasses.replace(sizes, **changes)
            module = model.build_model(
                changed, model.transformer_config(changed, ONE, torch.float32, {})
            )
            live = model.named_weights(module)
            planned = {h.param: sum(map(len, h.segments)) for h in trainer_layout(changed, ONE, 0)}
            assert planned.keys() == live.keys(), planned.keys() ^ live.keys()
            for h in trainer_layout(changed, ONE, 0):
                assert live[h.param].shape[h.dim] == planned[h.param], h.param
            out = _logprobs(module, tiny.micro_batches[0])
            found[name] = bool(out.isfinite().all())
        nothing = forward.packed(MicroBatch((), ()), 1, CPU)
        module.train()
        out = forward.forward_step(module, nothing, TEMPERATURE, CHUNK)
        out.sum().backward()
        found["nothing"] = tuple(out.shape) == (2, 0) and not any(
            p.grad.any() for p in module.parameters() if p.grad is not None
        )
    return found


def test_other_models_and_nothing_to_train_on(tiny: Tiny) -> None:
    (found,) = run_ranks(1, _unlike_tiny, tiny)
    assert all(found.values()), found


# ---- bf16


def _bf16(world: World, tiny: Tiny, layout: Any) -> dict[str, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    with world.layout(layout):
        module = load(tiny.folder, layout, world.rank, torch.bfloat16)
        ddp = DistributedDataParallel(
            module.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module
        )
        micro_batch, expected = tiny.micro_batches[0], tiny.expected[0]
        inputs = forward.packed(micro_batch, layout.tp, CPU)
        out = forward.forward_step(ddp, inputs, TEMPERATURE, CHUNK)
        loss(out, micro_batch, 1).backward()
        weights = model.named_weights(ddp)
        return {
            "fp32": {n for n, t in weights.items() if t.dtype is torch.float32},
            "others": {t.dtype for t in weights.values()} - {torch.float32},
            "error": (out - expected)[0].detach().abs().mean().item(),
            "no grad": [
                n
                for n, t in weights.items()
                if isinstance(t, nn.Parameter)
                and not (t.main_grad.isfinite().all() and t.main_grad.any())
            ],
        }


def test_bf16(tiny: Tiny) -> None:
    layout = dims(tp=2, ep=2)
    for found in run_ranks(2, _bf16, tiny, layout):
        assert found["others"] == {torch.bfloat16}
        kept = {name.rsplit(".", 1)[1] for name in found["fp32"]}
        assert kept == {"A_log", "D", "dt_bias", "expert_bias"}
        assert len(found["fp32"]) == 3 * 3 + 2  # of three Mamba and two MoE layers
        assert found["error"] < 0.2
        assert not [n for n in found["no grad"] if "experts.local" not in n]
