"""The table covers every row of every HF tensor, at every layout, and cuts heads never."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.weights.table import hf_tensors, iter_segments, mtp_tensors, rows, trainer_layout

MODEL = NemotronH(
    pattern="MEM*-E",
    mtp_pattern="*E",
    vocab_size=64,
    hidden_size=32,
    norm_eps=1e-5,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    mamba_num_groups=4,
    conv_kernel=4,
    chunk_size=16,
    dense_ffn_size=48,
    num_experts=8,
    top_k=2,
    expert_ffn_size=24,
    shared_ffn_size=40,
    latent_size=16,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    eos_token_ids=(2,),
)

LAYOUTS = [
    ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1),
    ParallelDims(tp=2, pp=1, dp=1, ep=1, expert_tp=2),
    ParallelDims(tp=2, pp=2, dp=2, ep=2, expert_tp=1),
    ParallelDims(tp=4, pp=1, dp=1, ep=4, expert_tp=1),
    ParallelDims(tp=1, pp=3, dp=4, ep=2, expert_tp=2),
]


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_every_row_is_hosted_equally_often(dims: ParallelDims) -> None:
    """Each row of each HF tensor is on as many ranks as it has replicas, none is lost."""
    hosts: Counter[tuple[str, int]] = Counter()
    for rank in range(dims.world_size):
        for hosted in trainer_layout(MODEL, dims, rank):
            for tensor, start, _, count in iter_segments(hosted):
                hosts.update((tensor, row) for row in range(start, start + count))
    for tensor in hf_tensors(MODEL).values():
        counts = {hosts[tensor.name, row] for row in range(tensor.shape[tensor.dim])}
        assert len(counts) == 1 and counts != {0}, f"{tensor.name}: replicas {counts}"
    assert {name for name, _ in hosts} == set(hf_tensors(MODEL))


def test_in_proj_gives_each_rank_whole_z_x_b_c_dt() -> None:
    (row,) = [r for r in rows(MODEL) if r.megatron == "decoder.layers.0.mixer.in_proj.weight"]
    inner, bc, heads = 64, 32, 8
    starts = [0, inner, 2 * inner, 2 * inner + bc, 2 * inner + 2 * bc]
    sizes = [inner, inner, bc, bc, heads]
    got = [(s.start, s.stop) for s in row.segments(1, 2)]
    assert got == [(a + n // 2, a + n) for a, n in zip(starts, sizes, strict=True)]


def test_qkv_is_grouped_by_key_value_head_and_cut_through_groups() -> None:
    """4 ranks on 2 key-value heads: Megatron cuts the interleaved rows evenly."""
    (row,) = [r for r in rows(MODEL) if r.megatron.endswith("linear_qkv.weight")]
    q, k, v = (f"backbone.layers.3.mixer.{x}_proj.weight" for x in "qkv")
    full = [(s.tensor, s.start, s.stop) for s in row.segments(0, 1)]
    assert full == [(q, 0, 16), (k, 0, 4), (v, 0, 4), (q, 16, 32), (k, 4, 8), (v, 4, 8)]
    second = [(s.tensor, s.start, s.stop) for s in row.segments(1, 4)]
    assert second == [(q, 12, 16), (k, 0, 4), (v, 0, 4)]


def test_mtp_tensors_are_those_of_its_layers_and_its_projections() -> None:
    names = set(mtp_tensors(MODEL))
    assert "mtp.layers.0.eh_proj.weight" in names
    assert "mtp.layers.0.mixer.q_proj.weight" in names
    assert "mtp.layers.1.final_layernorm.weight" in names
    assert "mtp.layers.1.mixer.gate.e_score_correction_bias" in names
    assert not mtp_tensors(replace(MODEL, mtp_pattern=""))


def test_parameter_count_of_nemotron_3_ultra() -> None:
    """549,308,968,960 parameters, from the published shape; buffers are not parameters."""
    ultra = NemotronH(
        pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
        "EMEMEM*EMEMEMEM*EMEMEMEME",
        mtp_pattern="*E",
        vocab_size=131072,
        hidden_size=8192,
        norm_eps=1e-5,
        num_heads=64,
        num_kv_heads=2,
        head_dim=128,
        mamba_num_heads=256,
        mamba_head_dim=64,
        ssm_state_size=128,
        mamba_num_groups=8,
        conv_kernel=4,
        chunk_size=128,
        dense_ffn_size=0,
        num_experts=512,
        top_k=22,
        expert_ffn_size=5120,
        shared_ffn_size=10240,
        latent_size=2048,
        routed_scaling_factor=5.0,
        norm_topk_prob=True,
        eos_token_ids=(2,),
    )
    tensors = hf_tensors(ultra).values()
    total = sum(t.numel for t in tensors if not t.name.endswith("e_score_correction_bias"))
    assert total == 549_308_968_960
    dims = ParallelDims(tp=8, pp=4, dp=4, ep=32, expert_tp=1)
    sizes = hf_tensors(ultra)
    for stage, expected in ((0, 5.5500e9), (1, 5.4158e9)):
        hosted = trainer_layout(ultra, dims, stage * 32)
        held = sum(
            len(s) * sizes[s.tensor].numel // sizes[s.tensor].shape[h.dim]
            for h in hosted
            for s in h.segments
        )
        assert held == pytest.approx(expected, rel=1e-4)
