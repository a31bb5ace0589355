"""One answer of a request, while its tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.rollout.probes import CLOSE
from miles_lite.serve.text import Reasoning, TextStream, ToolCall, ToolText, cut
from miles_lite.types import Finish, Request, Sampling


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of a request; or the news that there will be none (Finish.abort)."""

    uid: int
    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of every answer to one prompt."""

    tokens: tuple[int, ...]  # of the prompt
    sampling: Sampling  # max_new_tokens of the whole answer
    stops: Sequence[str]
    wants_logprobs: bool
    # of chats only
    is_chat: bool = False
    parts_reasoning: bool = True
    thinks: bool = False  # the prompt opens a think block
    thinking_budget: int | None = None
    one_call: bool = False  # of a tool, and the answer is over
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # schema by name


@dataclass(slots=True)
class Delta:
    """What some tokens add to an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    # the tokens, if their log-probs are wanted; the one that ends an answer is no part of it
    drawn: list[Drawn] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.drawn)


class Choice:
    """Life: request() to the engine, take() what it draws; if then neither the answer nor the
    client's patience is over, request() again, and so on, until `finish` says how it ended.

    A thinking budget is what makes it more than one request: an engine is asked for so many tokens,
    and if the model still thinks, it goes on from a prompt in which thinking is over. What is drawn
    depends on seed and position only, so an interruption that changes nothing is not noticed.
    """

    def __init__(self, index: int, wish: Wish, tokenizer: ChatTokenizer) -> None:
        self.index, self.wish = index, wish
        self.finish: Literal["", "stop", "length", "tool_calls"] = ""
        self.num_drawn = self.num_forced = 0  # tokens; forced ones end the thinking
        self.num_calls = 0  # of tools, told in pieces
        self.num_reasoning = 0  # those of both that are thinking
        self._tokenizer = tokenizer
        self._tokens = list(wish.tokens)
        self._stream = TextStream(tokenizer.decode)
        self._held = ""  # may be the beginning of a stop string
        self._is_cut = False  # at a stop string
        self._reasoning = Reasoning(wish.thinks) if wish.is_chat else None
        self._tools = ToolText(wish.tools) if wish.tools else None
        self._has_called = False
        self._budget = wish.thinking_budget
        self._begin = ""  # what is told with the first token
        if self._budget == 0 and wish.thinks:
            self._begin = self._end_thinking()
        elif self._budget == 0:
            self._budget = 1  # the model may open a think block itself

    def request(self, uid: int) -> Request:
        left = self.wish.sampling.max_new_tokens - self.num_drawn
        if self._budget is not None:
            left = min(left, self._budget - self.num_drawn)
        sampling = replace(self.wish.sampling, max_new_tokens=left)
        return Request(uid, tuple(self._tokens), sampling)

    def take(self, drawn: Drawn, delta: Delta) -> None:
        """The next token, told to `delta`."""
        if self._begin:
            self._add(delta, self._begin)
            self._begin = ""
        self.num_drawn += 1
        self.num_reasoning += self._is_thinking
        self._tokens.append(drawn.token)
        if drawn.finish is Finish.stop:  # the token says that the answer is over: no part of it
            self.finish = "stop"
        else:
            self._add(delta, self._stream.feed(drawn.token))
            if self.wish.wants_logprobs:
                delta.drawn.append(drawn)
        if not self.finish and self.num_drawn >= self.wish.sampling.max_new_tokens:
            self.finish = "length"
        if not self.finish and drawn.finish is Finish.length:  # the budget is spent
            self._budget = None
            if self._is_thinking:
                self._add(delta, self._stream.flush() + self._end_thinking())
        if self.finish:
            self._close(delta)

    @property
    def _is_thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.thinking

    def _end_thinking(self) -> str:
        """As if the model had closed its think block; returns what it wrote."""
        self._budget = None
        forced = self._tokenizer.encode(CLOSE)
        self._tokens += forced
        self.num_forced += len(forced)
        self.num_reasoning += len(forced)
        return CLOSE

    def _add(self, delta: Delta, text: str) -> None:
        """Up to a stop string, of which the beginning may have come before."""
        before, marker, self._held = cut(self._held + text, self.wish.stops)
        if marker:
            self.finish, self._is_cut = "stop", True
        self._part(delta, before)

    def _part(self, delta: Delta, text: str) -> None:
        if self._reasoning is not None:
            thought, answer = self._reasoning.feed(text)
            if self.wish.parts_reasoning:
                delta.reasoning += thought
                text = answer
        self._tell(delta, text)

    def _tell(self, delta: Delta, text: str) -> None:
        if self._tools is not None:
            text, calls = self._tools.feed(text)
            delta.calls += calls
            self._has_called = self._has_called or bool(calls)
            if calls and self.wish.one_call:
                self.finish = "stop"
        delta.text += text

    def _close(self, delta: Delta) -> None:
        """Tell what was held back in case it became something else."""
        if not self._is_cut:
            self._part(delta, self._held + self._stream.flush())
        if self._reasoning is not None and self.wish.parts_reasoning:
            thought, text = self._reasoning.flush()
            delta.reasoning += thought
            self._tell(delta, text)
        if self._tools is not None:
            delta.text += self._tools.flush()
        if self._has_called and self.finish == "stop":
            self.finish = "tool_calls"
