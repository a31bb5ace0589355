"""What an engine's answer must be before anything is made of it: an engine may fail quietly."""

from __future__ import annotations

import math

from miles_lite.types import Completion, Finish, Request

ROUNDING = 1e-3  # nats, by which a log-prob may be above 0


def answer_fault(request: Request, answer: Completion, version: int, vocab_size: int) -> str:
    """What is wrong with it, "" if nothing is. version: of the weights that it should be of."""
    tokens, sampling = answer.tokens, request.sampling
    if answer.version != version:
        return f"is of weights of version {answer.version}; the policy is at version {version}"
    if answer.finish is Finish.abort:
        return "was aborted, which nobody asked for"
    if request.scored and tokens != request.scored:
        return "is not the one that was to be scored"
    if not 0 < len(tokens) <= sampling.max_new_tokens:
        return f"has {len(tokens)} tokens; wanted 1 to {sampling.max_new_tokens}"
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        return f"has token ids {min(tokens)} .. {max(tokens)}; vocab_size is {vocab_size}"
    if len(answer.logprobs) != len(tokens):
        return f"has {len(tokens)} tokens and {len(answer.logprobs)} log-probs"
    # no loop of Python over tokens: the driver looks at millions of them in a step
    if not (all(map(math.isfinite, answer.logprobs)) and max(answer.logprobs) <= ROUNDING):
        place, wrong = next(
            (place, logprob)
            for place, logprob in enumerate(answer.logprobs)
            if not (math.isfinite(logprob) and logprob <= ROUNDING)
        )
        return f"has {wrong} for the log-prob of token {place}"
    if request.scored:
        return ""
    stops = [tokens.index(stop) for stop in sampling.stop_token_ids if stop in tokens]
    if stops and (first := min(stops)) < len(tokens) - 1:
        return f"goes on after stop token {tokens[first]} at place {first}"
    if answer.finish is Finish.stop and not stops:
        return f"ended without a stop token, with {tokens[-1]}"
    if answer.finish is Finish.length and len(tokens) < sampling.max_new_tokens:
        return f"was cut at {len(tokens)} tokens; the limit is {sampling.max_new_tokens}"
    return ""
