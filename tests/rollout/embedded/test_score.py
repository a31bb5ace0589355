"""Scoring a given answer: one prefill gives what decoding it token by token gave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from miles_lite.types import Completion, Finish, Request
from tests.rollout.embedded.helpers import SAMPLED, StartRank, Tiny, random_prompt, run

HOT = replace(SAMPLED, temperature=0.7, wants_routing=True)


def scored(request: Request, done: Completion, uid: int) -> Request:
    sampling = replace(request.sampling, max_new_tokens=len(done.tokens))
    return Request(uid, request.tokens, sampling, done.tokens)


def test_a_prefill_scores_what_was_decoded(tiny: Tiny, start: StartRank) -> None:
    """Beside requests that draw; the log-probs are those of transformers."""
    rank = start()
    requests = [Request(i, random_prompt(5 + i, i), replace(HOT, seed=i)) for i in range(4)]
    drawn = run(rank, requests)
    again = [scored(request, drawn[request.uid], 10 + request.uid) for request in requests]
    mixed = run(rank, [*again, replace(requests[0], uid=20)])
    assert mixed[20].tokens == drawn[0].tokens
    for request in requests:
        decoded, prefilled = drawn[request.uid], mixed[10 + request.uid]
        assert prefilled.tokens == decoded.tokens and prefilled.finish is Finish.length
        assert prefilled.logprobs == pytest.approx(decoded.logprobs, abs=1e-4)
        assert prefilled.routing == decoded.routing
        logits = tiny.logits(request.tokens + decoded.tokens)[len(request.tokens) - 1 : -1]
        want = torch.log_softmax(logits / 0.7, -1)
        want = want.gather(1, torch.tensor(decoded.tokens)[:, None])[:, 0]
        assert prefilled.logprobs == pytest.approx(want.tolist(), abs=1e-4)


def test_an_answer_is_scored_whole_and_the_last_stop_token_ends_it(start: StartRank) -> None:
    rank, answer = start(), (7, 9, 7)
    sampling = replace(HOT, max_new_tokens=3, stop_token_ids=(7,))
    (done,) = run(rank, [Request(1, random_prompt(4, 0), sampling, answer)]).values()
    assert done.tokens == answer and len(done.logprobs) == 3 and done.finish is Finish.stop


def test_log_probs_among_the_kept_tokens_are_those_of_a_smaller_distribution(
    tiny: Tiny, start: StartRank
) -> None:
    """Against transformers' own top-k and top-p; and only for requests that ask for them."""
    rank, prompt = start(), random_prompt(6, 1)
    cut = replace(HOT, top_k=20, top_p=0.6)
    (drawn,) = run(rank, [Request(1, prompt, cut)]).values()
    asked = scored(Request(1, prompt, replace(cut, truncated=True)), drawn, 2)
    done = run(rank, [asked, scored(Request(1, prompt, cut), drawn, 3)])
    logits = tiny.logits(prompt + drawn.tokens)[len(prompt) - 1 : -1] / 0.7
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.6)):
        logits = warper(torch.tensor([[0]]), logits)
    want = torch.log_softmax(logits, -1).gather(1, torch.tensor(drawn.tokens)[:, None])[:, 0]
    assert done[2].logprobs == pytest.approx(want.tolist(), abs=1e-4)
    assert done[3].logprobs == pytest.approx(drawn.logprobs, abs=1e-4)
    assert min(a - b for a, b in zip(done[2].logprobs, drawn.logprobs, strict=True)) > 0.1


def test_an_answer_of_another_length_is_refused(start: StartRank) -> None:
    with pytest.raises(ValueError, match="2 tokens to score and max_new_tokens = 12"):
        start().submit([Request(1, (1, 2), HOT, (3, 4))])
