"""Tokens from logits. A draw depends on its request's seed and position and on nothing else.

Not on the batch it is in, the rank that draws it, or how many engines there are: each draw uses
one uniform number hashed from (seed, position) and inverts the CDF over tokens in vocabulary order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from miles_lite.types import Sampling

DRAW = -1  # in place of a token that is given
ROWS = 64  # distributions sorted at a time: those of a scored answer are as many as its tokens


def draw(
    logits_S_V: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [S] and their log-probs [S], at the request's temperature and before top-k and top-p
    unless it wants them `truncated`.

    positions: of the drawn token in its sequence, prompt included. Temperature 0 takes the
    likeliest token; its log-prob is that of temperature 1. `given` [S] are taken instead of drawn,
    where they are not DRAW.
    """
    device = logits_S_V.device
    logprobs = _logprobs(logits_S_V, samplings)
    is_greedy = [s.temperature == 0 for s in samplings]
    if given is not None and bool((given != DRAW).all()):
        tokens = given
    elif all(is_greedy):
        tokens = logits_S_V.argmax(-1)
    else:
        tokens = _invert_cdf(logprobs.exp(), samplings, positions)
        if any(is_greedy):
            greedy = torch.tensor(is_greedy, device=device)
            tokens = torch.where(greedy, logits_S_V.argmax(-1), tokens)
    if given is not None:
        tokens = torch.where(given == DRAW, tokens, given)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    if any(s.truncated for s in samplings):
        chosen = chosen - log_kept(logprobs, samplings)
    return tokens, chosen


def likeliest(
    logits_S_V: Tensor, samplings: Sequence[Sampling]
) -> list[Sequence[tuple[int, float]]]:
    """Of each sequence the `top_logprobs` likeliest tokens with their log-probs, as in `draw`."""
    top = _logprobs(logits_S_V, samplings).topk(max(s.top_logprobs for s in samplings))
    return [
        list(zip(tokens, logprobs, strict=True))[: sampling.top_logprobs]
        for tokens, logprobs, sampling in zip(
            top.indices.tolist(), top.values.tolist(), samplings, strict=True
        )
    ]


def _logprobs(logits_S_V: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=logits_S_V.device)
    return torch.log_softmax(logits_S_V.float() / temperature[:, None], -1)


def _invert_cdf(probs: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    if any(s.truncates for s in samplings):
        probs = probs * kept(probs, samplings)
    # fp64: a running sum over 10^5 tokens in fp32 would misplace the rare ones
    cdf = probs.cumsum(-1, dtype=torch.float64)
    noise = torch.from_numpy(uniform([s.seed for s in samplings], positions)).to(probs.device)
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    # NaN logits end up beyond the vocabulary; the caller sees them in the log-prob
    return tokens.clamp(max=probs.shape[1] - 1)


def kept(probs: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Tokens [S, V] in the top k and, of the distribution over those, in the smallest top set of
    mass top_p. The likeliest token always stays; of equal ones the lower id counts as likelier."""
    device, vocab = probs.device, probs.shape[1]
    top_k = torch.tensor([s.top_k or vocab for s in samplings], device=device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=probs.dtype, device=device)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    in_top_k = torch.arange(vocab, device=device) < top_k[:, None]
    ranked = ranked * in_top_k
    above = ranked.cumsum(-1) - ranked  # mass of likelier tokens
    in_top_p = above < top_p[:, None] * ranked.sum(-1, keepdim=True)
    # rounding must not cut the tail of a request that keeps everything
    in_top_p |= top_p[:, None] >= 1
    in_top_p[:, 0] = True
    return torch.zeros_like(in_top_p).scatter(1, order, in_top_k & in_top_p)


def log_kept(logprobs: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Log [S] of the mass that top-k and top-p leave; 0 of requests that do not ask for it."""
    log_mass = logprobs.new_zeros(len(samplings))
    asked = [row for row, s in enumerate(samplings) if s.truncated and s.truncates]
    for start in range(0, len(asked), ROWS):
        rows = asked[start : start + ROWS]
        probs = logprobs[rows].exp()
        log_mass[rows] = (probs * kept(probs, [samplings[row] for row in rows])).sum(-1).log()
    return log_mass


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """fp64 [S] in [0, 1), a function of (seed, position) only: splitmix64 (Steele et al. 2014)."""
    state = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    state = _mix(state + _GOLDEN) + np.array(positions, dtype=np.uint64) * _GOLDEN
    # 52 bits, so that noise * total < total also after rounding
    return (_mix(state) >> np.uint64(12)) * 2.0**-52


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
