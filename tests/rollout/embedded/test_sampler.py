"""Draws: what they depend on, what they follow, and what truncation does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from miles_lite.rollout.embedded.sampler import draw, uniform
from tests.rollout.embedded.helpers import GREEDY, SAMPLED

LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, -3.0])


def draws(number: int, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs of `number` positions of one request over LOGITS."""
    sampling = replace(SAMPLED, seed=42, **changes)
    return draw(LOGITS.expand(number, -1), [sampling] * number, range(number))


def test_uniform_is_splitmix64_of_seed_and_position():
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden, seeds, positions = 0x9E3779B97F4A7C15, [0, 7, 2**63 + 5, -1, 2**70 + 7], [0, 3, 9, 1, 3]
    expected = [
        (mix((mix((seed % 2**64 + golden) % 2**64) + position * golden) % 2**64) >> 12) / 2**52
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert uniform(seeds, positions).tolist() == expected
    assert mix(golden) == 0xE220A8397B1DCDAF  # first output of the published generator, seed 0


def test_uniform_is_uniform_along_seeds_and_along_positions():
    for noise in (uniform(range(20_000), [5] * 20_000), uniform([5] * 20_000, range(20_000))):
        counts = np.histogram(noise, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared, 19 degrees: p = 0.0007
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.03


def test_frequencies_follow_the_tempered_softmax():
    for temperature in (1.0, 0.5):
        tokens, logprobs = draws(20_000, temperature=temperature)
        probs = torch.softmax(LOGITS / temperature, -1)
        counts = torch.bincount(tokens, minlength=len(LOGITS))
        assert ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum() < 23  # 5 degrees
        torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_truncation_keeps_the_right_tokens_and_leaves_logprobs_alone():
    full = torch.log_softmax(LOGITS, -1)
    cases = {  # of probabilities .416 .252 .252 .056 .021 .003
        (2, 1.0): {0, 1},  # of equal tokens the lower id
        (0, 0.40): {0},
        (0, 0.50): {0, 1},
        (0, 0.90): {0, 1, 2},
        (0, 0.95): {0, 1, 2, 3},
        (0, 1e-9): {0},
        (2, 0.60): {0},  # .416 of .668 is above .6
        (100, 1.0): {0, 1, 2, 3, 4, 5},
    }
    for (top_k, top_p), kept in cases.items():
        tokens, logprobs = draws(4000, top_k=top_k, top_p=top_p)
        assert set(tokens.tolist()) == kept, (top_k, top_p)
        torch.testing.assert_close(logprobs, full[tokens])
        probs = torch.softmax(LOGITS[sorted(kept)], -1)
        counts = torch.bincount(tokens, minlength=6)[sorted(kept)]
        torch.testing.assert_close(counts / 4000, probs, atol=0.03, rtol=0)


def test_a_draw_does_not_see_its_batch():
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    samplings = [
        replace(SAMPLED, seed=1),
        replace(SAMPLED, seed=1, top_k=5),
        GREEDY,
        replace(SAMPLED, seed=2, top_p=0.7, temperature=0.3),
        replace(SAMPLED, seed=3),
    ]
    together = draw(logits, samplings, [4, 4, 5, 6, 7])
    for i in range(5):
        alone = draw(logits[i : i + 1], samplings[i : i + 1], [[4, 4, 5, 6, 7][i]])
        assert alone[0][0] == together[0][i]
        torch.testing.assert_close(alone[1][0], together[1][i])
    assert together[0][2] == logits[2].argmax()


def test_rare_and_impossible_tokens():
    logits = torch.full((1, 1000), -float("inf"))
    logits[0, [3, 999]] = torch.tensor([0.0, -2.0])
    for seed in range(200):
        token = draw(logits, [replace(SAMPLED, seed=seed)], [0])[0].item()
        assert token in (3, 999)
    assert draw(logits * float("nan"), [SAMPLED], [0])[1].isnan().all()
