"""A tiny random Nemotron-H checkpoint, and what transformers computes with it."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_lite.types import MicroBatch, TrainSequence

TEMPERATURE = 0.8
ENTROPY_WEIGHT = 0.1


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and its truth: log-probs and entropies by transformers, and their gradients."""

    folder: Path
    grads: Path  # a checkpoint whose tensors are the gradients of `loss` in those of `folder`
    micro_batches: list[MicroBatch]
    expected: list[Tensor]  # [2, N] log-probs and entropies of each micro-batch


def loss(logprobs_entropy: Tensor, micro_batch: MicroBatch, num_micro_batches: int) -> Tensor:
    """Something to differentiate: weighted log-probs and a little entropy, averaged."""
    lens = torch.tensor([s.response_len for s in micro_batch.sequences])
    weights = torch.tensor(micro_batch.token_weights).repeat_interleave(lens)
    logprobs, entropy = logprobs_entropy
    return (weights * logprobs + ENTROPY_WEIGHT * entropy).sum() / num_micro_batches


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """All four kinds of layers, experts in a latent width, sizes for TP 4 with 2 KV heads."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=128,
        hidden_size=64,
        hybrid_override_pattern="MEM*-EM*",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=4,
        conv_kernel=4,
        chunk_size=16,
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
    model = NemotronHForCausalLM(config).train()
    _make_untrivial(model)
    root = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(root / "weights")
    micro_batches = _micro_batches(config.vocab_size)
    expected = []
    for micro_batch in micro_batches:
        out = _logprobs(model, micro_batch)
        expected.append(out.detach())
        loss(out, micro_batch, len(micro_batches)).backward()
    _as_grads(model).save_pretrained(root / "grads")
    return Tiny(root / "weights", root / "grads", micro_batches, expected)


def _make_untrivial(model: torch.nn.Module) -> None:
    """So that every weight matters; and transformers' own clamp of Mamba's time step is off."""
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn_like(p)
            if name.endswith(("e_score_correction_bias", "A_log", "D", "dt_bias", "bias")):
                p.add_(0.3 * noise)
            elif "norm" in name:
                p.add_(0.2 * noise)
            elif p.dim() > 1 and "embed" not in name:
                p.copy_(noise * (0.7 if "conv" in name else p.shape[-1] ** -0.5))
            elif p.dim() > 1:
                p.copy_(noise)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def _micro_batches(vocab_size: int) -> list[MicroBatch]:
    """Lengths from 2 to 70 (over chunk boundaries), totals that TP does not divide."""
    draw = random.Random(0)
    lens = ([5, 33, 8, 17], [70], [3, 2, 2, 41, 19], [16, 16, 1 + 32])
    micro_batches, sample = [], 0
    for group in lens:
        sequences = []
        for length in group:
            prompt_len = draw.randint(1, length - 1)
            tokens = tuple(draw.randrange(vocab_size) for _ in range(length))
            logprobs = (0.0,) * (length - prompt_len)
            sequences.append(
                TrainSequence(
                    tokens=tokens,
                    prompt_len=prompt_len,
                    logprobs=logprobs,
                    sample=sample,
                    group=0,
                    reward=0.0,
                    advantage=0.0,
                    counts=True,
                )
            )
            sample += 1
        weights = tuple(draw.uniform(-1, 1) for _ in group)
        micro_batches.append(MicroBatch(tuple(sequences), weights))
    return micro_batches


def _logprobs(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """[2, N] by full logits, each sequence on its own."""
    found = []
    for sequence in micro_batch.sequences:
        logits = model(torch.tensor([sequence.tokens])).logits[0].float() / TEMPERATURE
        logp = logits.log_softmax(-1)[sequence.prompt_len - 1 : -1]
        targets = torch.tensor(sequence.tokens[sequence.prompt_len :])
        chosen = logp.gather(1, targets[:, None])[:, 0]
        found.append(torch.stack((chosen, -(logp.exp() * logp).sum(-1))))
    return torch.cat(found, dim=1)


def _as_grads(model: torch.nn.Module) -> torch.nn.Module:
    copy = deepcopy(model)
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        ours.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad.clone()
    return copy
