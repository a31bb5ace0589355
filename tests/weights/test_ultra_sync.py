"""The sync of the reference run, 128 trainer ranks to 4 SGLang engines of 32, planned for real."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.rollout.sglang.layout import Cuts, params
from miles_lite.weights.plan import sync_plan
from miles_lite.weights.table import hf_tensors, trainer_layout

MODEL = NemotronH.from_folder(Path(__file__).parents[2] / "configs/model/nemotron3_ultra")
TRAINER = ParallelDims(tp=8, pp=4, dp=4, ep=32, expert_tp=1)
ENGINE = EngineDims(tp=32, dp=4, ep=32)


def hosted_bytes() -> int:
    """Of an engine rank, from the sizes of the model alone. bf16; fp32 are A and the router's bias.

    Attention and Mamba are cut over 8 ranks of a DP group, experts, shared experts and the head
    over all 32; routers, latent projections and norms are whole. Of 2 KV heads each rank has one.
    """
    hidden, group, every = MODEL.hidden_size, ENGINE.attn_tp, ENGINE.tp
    inner, bc, heads = MODEL.mamba_inner_size, MODEL.mamba_bc_size, MODEL.mamba_num_heads
    conv = inner + 2 * bc
    mamba = (2 * inner + 2 * bc + heads) * hidden + conv * (MODEL.conv_kernel + 1)
    mamba += 2 * heads + inner + inner * hidden
    attention = 2 * MODEL.num_heads * MODEL.head_dim * hidden // group
    attention += 2 * MODEL.head_dim * hidden * max(1, MODEL.num_kv_heads // group)
    width = MODEL.latent_size
    experts = 2 * MODEL.num_experts * MODEL.expert_ffn_size * width // every
    experts += 2 * MODEL.shared_ffn_size * hidden // every
    experts += MODEL.num_experts * hidden + 2 * width * hidden
    count = {kind: MODEL.pattern.count(kind) for kind in "M*E"}
    numel = count["M"] * mamba // group + count["*"] * attention + count["E"] * experts
    numel += (len(MODEL.pattern) + 1) * hidden  # norms
    numel += MODEL.vocab_size * hidden // group + MODEL.vocab_size * hidden // every
    fp32 = count["M"] * heads // group + count["E"] * MODEL.num_experts
    return 2 * numel + 4 * fp32


@pytest.mark.slow
def test_every_rank_receives_what_it_hosts_and_no_more() -> None:
    sources = [trainer_layout(MODEL, TRAINER, rank) for rank in range(TRAINER.world_size)]
    held = [params(MODEL, ENGINE, rank % ENGINE.tp, Cuts()) for rank in range(128)]
    targets = [[hosted for param in rank for hosted in param.hosted] for rank in held]
    routes = sync_plan(hf_tensors(MODEL), sources, targets, range(128), 2, 256 << 20)
    received: Counter[int] = Counter()
    for route in routes:
        received[route.target] += route.num_bytes
    assert set(received.values()) == {hosted_bytes()}
    assert hosted_bytes() == pytest.approx(42.19e9, rel=1e-4)
    at_home = sum(route.num_bytes for route in routes if route.source == route.target)
    # each stage has a quarter of the experts, and the engine beside it wants all of them
    assert at_home / sum(received.values()) == pytest.approx(0.247, abs=0.01)
