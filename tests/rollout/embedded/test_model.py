"""The forward pass against transformers, whole layouts apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles_lite.rollout.embedded.experts import mix_experts, relu2, route
from miles_lite.types import Request
from tests.rollout.embedded.helpers import (
    GREEDY,
    SAMPLED,
    StartRank,
    Tiny,
    build,
    random_prompt,
    run,
)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_transformers(tiny: Tiny, start: StartRank, temperature: float):
    sampling = replace(SAMPLED, temperature=temperature, max_new_tokens=30)
    requests = [
        Request(uid, random_prompt(length, uid), replace(sampling, seed=uid))
        for uid, length in enumerate((40, 1, 3, 17, 8))
    ]
    for uid, completion in run(start(), requests).items():
        prompt = requests[uid].tokens
        logits = tiny.logits(prompt + completion.tokens)[len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / (temperature or 1.0), -1)
        tokens = torch.tensor(completion.tokens)
        if temperature == 0:
            assert torch.equal(tokens, logits.argmax(-1))
        got = torch.tensor(completion.logprobs)
        torch.testing.assert_close(
            got, expected.gather(1, tokens[:, None])[:, 0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_latent_size": None},
        {"norm_topk_prob": False, "n_groups": 1, "num_key_value_heads": 4},
        {"hybrid_override_pattern": "M-M*", "conv_kernel": 3, "chunk_size": 128},
    ],
    ids=["no-latent", "no-topk-norm", "dense"],
)
def test_variants(tmp_path: Path, start: StartRank, changes: dict):
    other = build(tmp_path, **changes)
    prompt = random_prompt(21, 3)
    completion = run(start(other), [Request(0, prompt, GREEDY)])[0]
    logits = other.logits(prompt + completion.tokens)[len(prompt) - 1 : -1]
    logprobs, tokens = torch.log_softmax(logits, -1).max(-1)
    assert completion.tokens == tuple(tokens.tolist())
    torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, atol=1e-4, rtol=0)


def test_decode_goes_on_where_a_longer_prefill_would_be(start: StartRank):
    """Reading prompt + k drawn tokens at once gives the distribution that decoding reached."""
    rank, prompt = start(), random_prompt(19, 5)
    whole = run(rank, [Request(0, prompt, GREEDY)])[0]
    for cut in (1, 5, 11):
        sampling = replace(GREEDY, max_new_tokens=12 - cut)
        rest = run(rank, [Request(cut, prompt + whole.tokens[:cut], sampling)])[cut]
        assert rest.tokens == whole.tokens[cut:]
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-4)


def test_bfloat16_runs_close_to_fp32(tiny: Tiny, start: StartRank):
    prompt = random_prompt(30, 7)
    completion = run(start(dtype="bfloat16"), [Request(0, prompt, GREEDY)])[0]
    logits = tiny.logits(prompt + completion.tokens)[len(prompt) - 1 : -1]
    tokens = torch.tensor(completion.tokens)[:, None]
    expected = torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]
    assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.3


@pytest.mark.parametrize("width", [12, 10], ids=["grouped", "too odd for it"])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["even", "one hot expert"])
def test_expert_mix_matches_a_loop_over_tokens(tiny: Tiny, spread: float, width: int):
    """Both ways to run experts, and the part of them that a rank with experts 2 .. 5 adds."""
    torch.manual_seed(1)
    config, num_tokens = tiny.model, 50
    up, down = torch.randn(8, width, 24), torch.randn(8, 24, width)
    u, v = torch.randn(num_tokens, 64), torch.randn(num_tokens, 24)
    gate, bias = 0.1 * torch.randn(8, 64), spread * torch.arange(8.0)
    choices, weights = route(u, gate, bias, config)
    for first, last in ((0, 8), (2, 6)):
        expected = torch.zeros(num_tokens, 24)
        for t in range(num_tokens):
            for expert, weight in zip(choices[t].tolist(), weights[t], strict=True):
                if first <= expert < last:
                    expected[t] += weight * (down[expert] @ relu2(up[expert] @ v[t]))
        got = mix_experts(v, choices, weights, up[first:last], down[first:last], first)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert mix_experts(v[:0], choices[:0], weights[:0], up, down, 0).shape == (0, 24)
