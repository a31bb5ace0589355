"""A tiny random checkpoint with transformers as its oracle; requests, and how to run them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.types import Completion, Request, Sampling

ONE = EngineDims(tp=1, dp=1, ep=1)

StartRank = Callable[..., EngineRank]  # of the fixture `start`


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and three views of it."""

    folder: Path
    model: NemotronH
    oracle: Any  # NemotronHForCausalLM

    def logits(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """[T, V] of the whole sequence, by transformers."""
        with torch.no_grad():
            return self.oracle(torch.tensor([tokens])).logits[0].float()


def build(folder: Path, **changes: Any) -> Tiny:
    """A random model in which no parameter is trivial, saved as HF checkpoint."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=128,
        hidden_size=64,
        hybrid_override_pattern="MEM*-E",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=4,
        conv_kernel=4,
        chunk_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=80,
        moe_latent_size=24,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
    )
    oracle = NemotronHForCausalLM(NemotronHConfig(**{**sizes, **changes})).eval()
    for name, value in oracle.state_dict().items():
        if "norm" in name:
            value.copy_(1 + 0.3 * torch.randn_like(value))
        elif name.endswith("e_score_correction_bias"):
            value.copy_(0.2 * torch.randn_like(value))
        elif name.endswith("dt_bias"):
            value.copy_(torch.randn_like(value) * 2 - 3)
        elif name.endswith(".D"):
            value.copy_(torch.randn_like(value))
        elif value.dim() >= 2:
            value.mul_(4.0)
    for module in oracle.modules():
        if hasattr(
            module, "time_step_limit"
        ):  # transformers clamps dt in prefill only; nobody else
            module.time_step_limit = (0.0, float("inf"))
    oracle.save_pretrained(folder)
    return Tiny(folder, NemotronH.from_folder(folder), oracle)


GREEDY = Sampling(seed=1, max_new_tokens=12, temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=())
SAMPLED = replace(GREEDY, temperature=1.0)


def random_prompt(length: int, seed: int, vocab: int = 128) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab) for _ in range(length))


def drain(rank: EngineRank, number: int, limit_s: float = 60.0) -> dict[int, Completion]:
    """Poll until `number` completions are there."""
    done: dict[int, Completion] = {}
    end = time.monotonic() + limit_s
    while len(done) < number:
        assert time.monotonic() < end, f"{len(done)} of {number} completions after {limit_s} s"
        done.update(rank.poll(1.0))
    assert len(done) == number
    return done


def run(rank: EngineRank, requests: Sequence[Request]) -> dict[int, Completion]:
    rank.submit(requests)
    return drain(rank, len(requests))
