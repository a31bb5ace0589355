"""What is taken for an answer, and what is said of everything else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from miles_lite.rollout.answer import answer_fault
from miles_lite.types import Completion, Finish, Request, Sampling

SAMPLING = Sampling(
    seed=1, max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(2, 3)
)
REQUEST = Request(1, (9, 9), SAMPLING)
SOUND = Completion((7, 8, 2), (-1.0, -0.5, 1e-6), 4, Finish.stop)
LONG = Completion((7, 8, 7, 8, 7), (-1.0,) * 5, 4, Finish.length)


def fault(answer: Completion, request: Request = REQUEST) -> str:
    return answer_fault(request, answer, version=4, vocab_size=10)


def test_a_sound_answer() -> None:
    assert fault(SOUND) == fault(LONG) == fault(replace(LONG, tokens=(7, 8, 7, 8, 3))) == ""
    scored = replace(REQUEST, scored=(2, 7, 8))  # goes on behind a stop token, as it was given
    answer = replace(SOUND, tokens=(2, 7, 8), finish=Finish.length)
    assert fault(answer, scored) == ""
    assert "is not the one that was to be scored" in fault(SOUND, scored)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, "version 3; the policy is at version 4"),
        ({"finish": Finish.abort}, "aborted"),
        ({"tokens": (), "logprobs": ()}, "0 tokens; wanted 1 to 5"),
        ({"tokens": (7,) * 6}, "6 tokens; wanted 1 to 5"),
        ({"tokens": (7, 10, 2)}, "token ids 2 .. 10; vocab_size is 10"),
        ({"tokens": (-1, 7, 2)}, "token ids -1 .. 7"),
        ({"logprobs": (-1.0, -0.5)}, "3 tokens and 2 log-probs"),
        ({"logprobs": (-1.0, math.nan, -0.5)}, "nan for the log-prob of token 1"),
        ({"logprobs": (math.nan, -1.0, -0.5)}, "nan for the log-prob of token 0"),
        ({"logprobs": (-1.0, -0.5, -math.inf)}, "-inf for the log-prob of token 2"),
        ({"logprobs": (-1.0, 0.5, 0.6)}, "0.5 for the log-prob of token 1"),
        ({"tokens": (7, 3, 2)}, "goes on after stop token 3 at place 1"),
        ({"tokens": (2, 7, 2)}, "goes on after stop token 2 at place 0"),
        ({"tokens": (7, 8, 9)}, "ended without a stop token, with 9"),
        ({"tokens": (7, 8, 9), "finish": Finish.length}, "cut at 3 tokens; the limit is 5"),
    ],
)
def test_what_is_no_answer(changes: dict[str, Any], words: str) -> None:
    assert words in fault(replace(SOUND, **changes))
