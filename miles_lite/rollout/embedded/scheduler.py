"""Who runs next in one data-parallel group. Pure Python: equal requests give equal schedules."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from miles_lite.types import Finish, Request


@dataclass(slots=True)
class Running:
    """A request and what was drawn for it so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routing: bytearray = field(default_factory=bytearray)  # of the tokens read so far, if wanted
    likeliest: Sequence[tuple[int, float]] = ()  # tokens and log-probs beside the last one drawn
    finish: Finish | None = None

    @property
    def position(self) -> int:
        """Of the next token to be drawn, in the whole sequence."""
        return len(self.request.tokens) + len(self.tokens)

    @property
    def num_wanted(self) -> int:
        """Tokens of the prefill's successors that are wanted: one, or all of an answer to score."""
        return len(self.request.scored) or 1

    def append(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.request.scored and len(self.tokens) < self.num_wanted:
            return  # whatever it holds, all of it is scored
        if token in self.request.sampling.stop_token_ids:
            self.finish = Finish.stop
        elif len(self.tokens) >= self.request.sampling.max_new_tokens:
            self.finish = Finish.length


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step: either new prompts, or the next token of everything that runs."""

    sequences: Sequence[Running]  # in slots first_slot, first_slot + 1, ...
    first_slot: int
    prompts: Sequence[tuple[int, ...]]  # different prompts to be read; none when decoding
    source: Sequence[int]  # of each sequence: its place in `prompts`

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) if self.prompts else len(self.sequences)

    @property
    def owners(self) -> list[Running]:
        """For each token that the step brings: whose it is."""
        return [s for s in self.sequences for _ in range(s.num_wanted if self.prompts else 1)]

    @property
    def wants_routing(self) -> bool:
        return any(sequence.request.sampling.wants_routing for sequence in self.sequences)

    def book_routing(self, routing: memoryview) -> None:
        """Give every sequence that of its tokens of this step; `routing` has equal bytes a token.
        Samples of a group share the reading of their prompt."""
        ends = list(accumulate(map(len, self.prompts), initial=0))
        size = len(routing) // self.num_tokens
        for index, sequence in enumerate(self.sequences):
            first, last = index, index + 1
            if self.prompts:
                first, last = ends[self.source[index]], ends[self.source[index] + 1]
            if sequence.request.sampling.wants_routing:
                sequence.routing += routing[first * size : last * size]


class Scheduler:
    """Waiting and running requests; running[i] occupies slot i of the cache."""

    def __init__(self, max_running: int, prefill_tokens: int):
        self.max_running = max_running
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, requests: Iterable[Request]) -> None:
        self.waiting.extend(Running(request) for request in requests)

    def plan(self) -> Plan | None:
        """The next step, or None when there is nothing to do. New prompts go before decoding."""
        first_slot = len(self.running)
        prompts: dict[tuple[int, ...], int] = {}
        source: list[int] = []
        max_len = 0
        while self.waiting and len(self.running) < self.max_running:
            prompt = self.waiting[0].request.read
            if prompt not in prompts:
                # the budget counts padding; one prompt is always let in, however long
                max_len = max(max_len, len(prompt))
                if prompts and (len(prompts) + 1) * max_len > self.prefill_tokens:
                    break
                prompts[prompt] = len(prompts)
            source.append(prompts[prompt])  # samples of a group share the reading of their prompt
            self.running.append(self.waiting.popleft())
        if not self.running:
            return None
        if not source:
            return Plan(tuple(self.running), 0, (), ())
        return Plan(tuple(self.running[first_slot:]), first_slot, tuple(prompts), source)

    def advance(
        self, plan: Plan, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> tuple[list[Running], list[tuple[int, int]]]:
        """Book what a step drew. Returns who finished and the slots to move: (from, to) pairs."""
        for sequence, token, logprob in zip(plan.owners, tokens, logprobs, strict=True):
            sequence.append(token, logprob)
        finished = [sequence for sequence in plan.sequences if sequence.finish]
        return finished, self._close_ranks() if finished else []

    def cancel(self, uids: Collection[int]) -> tuple[list[Running], list[tuple[int, int]]]:
        """Give up these requests, with what they have; some may be gone already. As `advance`."""
        given_up = [s for s in (*self.running, *self.waiting) if s.request.uid in uids]
        for sequence in given_up:
            sequence.finish = Finish.abort
        self.waiting = deque(s for s in self.waiting if not s.finish)
        return given_up, self._close_ranks()

    def _close_ranks(self) -> list[tuple[int, int]]:
        """Drop what has ended; the last slots move into the holes: (from, to) pairs."""
        num_left = sum(1 for sequence in self.running if not sequence.finish)
        holes = [slot for slot in range(num_left) if self.running[slot].finish]
        movers = [
            slot for slot in range(num_left, len(self.running)) if not self.running[slot].finish
        ]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self.running[target] = self.running[source]
        del self.running[num_left:]
        return moves

    def abort(self) -> list[Running]:
        """Give up everything, with what it has."""
        given_up = [*self.running, *self.waiting]
        self.running, self.waiting = [], deque()
        for sequence in given_up:
            sequence.finish = Finish.abort
        return given_up
