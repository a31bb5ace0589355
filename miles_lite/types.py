"""The nouns of a step, one frozen type a stage. A stage that learns a fact makes a new type.

Prompt -> Request -engine-> Completion -reward-> Sample -by prompt-> Group
Group -credit-> TrainSequence -pack-> Batch
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Finish(Enum):
    stop = "stop"  # the model ended its answer with a stop token
    length = "length"  # cut at max_new_tokens
    abort = "abort"  # given up on request; its tokens are never trained on


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data set, rendered and tokenised."""

    uid: str  # source and row number, "gsm8k:17": unique in a run
    tokens: tuple[int, ...]  # [T] of the rendered chat template, generation prompt included
    text: str  # what was tokenised
    label: str  # the right answer, as the reward function wants it
    reward: str  # which reward scores it: a name in reward.others, or "" for the run's own
    metadata: Mapping[str, Any]  # of the data row, for reward functions that ask for it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is drawn. Equal fields and weights give equal tokens, always."""

    seed: int
    max_new_tokens: int
    temperature: float  # 0 means greedy; log-probs are then those of temperature 1
    top_p: float  # 1 keeps all tokens
    top_k: int  # 0 keeps all tokens
    stop_token_ids: tuple[int, ...]
    wants_routing: bool = False  # the completion is to say which experts computed it
    top_logprobs: int = 0  # so many likeliest tokens are told to whoever follows the drawing
    truncated: bool = False  # log-probs are those among the tokens that top-p and top-k keep

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked for: one completion of one prompt; or what it thinks of one."""

    uid: int  # unique within an engine's life
    tokens: tuple[int, ...]
    sampling: Sampling
    # an answer to be read in one prefill instead of drawn: it comes back with the log-probs that
    # it has so; max_new_tokens is its length
    scored: tuple[int, ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """What is prefilled. The last token of an answer is never read."""
        return self.tokens + self.scored[:-1]


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts an engine chose for each token of a sequence; `algo.routing` makes and reads it.

    Bytes and not numbers: megabytes a sample, which cross processes without being copied.
    """

    # [T, E layers, top k], unsigned integers of `item_bytes`
    experts: bytes | memoryview = field(repr=False)
    shape: tuple[int, int, int]  # (0, 0, 0): nothing is known
    item_bytes: int

    @property
    def known(self) -> bool:
        return self.shape != (0, 0, 0)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        flat = pickle.PickleBuffer(self.experts) if protocol >= 5 else bytes(self.experts)
        return _routing, (flat, self.shape, self.item_bytes)


def _routing(experts: Any, shape: tuple[int, int, int], item_bytes: int) -> Routing:
    """Ray hands out buffers of its own kind, in memory that all processes of a host share."""
    if not isinstance(experts, bytes):
        experts = memoryview(experts).cast("B")
    return Routing(experts, shape, item_bytes)


NO_ROUTING = Routing(b"", (0, 0, 0), 1)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine answers. The stop token, if any, is the last token."""

    tokens: tuple[int, ...]  # [T] generated, without the prompt
    logprobs: tuple[float, ...]  # [T] at its temperature, before top-p/top-k unless `truncated`
    version: int  # of the weights that drew every one of these tokens
    finish: Finish
    routing: Routing = NO_ROUTING  # of prompt and answer but the last token, which was never read


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reward function says of one answer. A verifier that failed is not a wrong answer."""

    reward: float  # used in training; 0.0 when invalid
    reason: str  # why there is no verdict ("timeout", "crash", ...); "" when there is one

    @property
    def valid(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: Prompt
    completion: Completion
    text: str  # of the completion, special tokens kept
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt; advantages are relative within it."""

    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(sample.verdict.reward for sample in self.samples)


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """What the loss sees of one sample. Tokens before `prompt_len` carry no loss."""

    tokens: tuple[int, ...]  # [T] prompt and response
    prompt_len: int
    logprobs: tuple[float, ...]  # [T - prompt_len] of the engine
    sample: int  # index in rollout order: the key under which per-sample results come back
    group: int  # index of the sample's group in rollout order
    reward: float  # what the advantage was made of
    advantage: float  # of the sample, before anything that needs the trainer's log-probs
    counts: bool  # False: neither in the loss nor in its denominators (no verdict, over-long)
    routing: Routing = NO_ROUTING  # for all tokens but the last

    @property
    def response_len(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward pass, packed end to end, and the loss weight of their tokens.

    token_weights[i] multiplies each response token of sequences[i]; over all micro-batches of an
    update they are the whole normalisation of the loss, so packing cannot change it.
    """

    sequences: tuple[TrainSequence, ...]
    token_weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.tokens) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: micro_batches[dp_rank][i], the same number on every DP rank."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's training work: the updates in rollout order."""

    updates: tuple[Update, ...]

    @property
    def sequences(self) -> Sequence[TrainSequence]:
        return [
            sequence
            for update in self.updates
            for rank in update.micro_batches
            for micro_batch in rank
            for sequence in micro_batch.sequences
        ]
