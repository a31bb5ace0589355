"""Answers in OpenAI's JSON, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.serve.choice import Choice, Delta, Drawn
from miles_lite.serve.text import ToolCall

Json = dict[str, Any]


@dataclass(slots=True)
class Form:
    """The frame of one response."""

    name: str
    tokenizer: ChatTokenizer
    is_chat: bool
    id: str
    created: int
    num_answers: int  # to each prompt

    @classmethod
    def of(cls, name: str, tokenizer: ChatTokenizer, is_chat: bool, num_answers: int) -> Form:
        ident = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        return cls(name, tokenizer, is_chat, ident, int(time.time()), num_answers)

    def whole(self, choices: Sequence[Choice], told: Sequence[Sequence[Delta]]) -> Json:
        shown = []
        for choice, deltas in zip(choices, told, strict=True):
            all_of_it = Delta(
                text="".join(delta.text for delta in deltas),
                reasoning="".join(delta.reasoning for delta in deltas),
                calls=[call for delta in deltas for call in delta.calls],
            )
            drawn = [drawn for delta in deltas for drawn in delta.drawn]
            logprobs = self._logprobs(drawn) if choice.wish.wants_logprobs else None
            body = {"index": choice.index, "finish_reason": choice.finish, "logprobs": logprobs}
            if self.is_chat:
                empty = None if all_of_it.calls else ""
                message = {"role": "assistant", "content": empty, "refusal": None}
                body["message"] = message | _fields(all_of_it)
            else:
                body["text"] = all_of_it.text
            shown.append(body)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, shown) | {"usage": self._usage(choices)}

    def opening(self, choice: Choice) -> Json:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def piece(self, choice: Choice, delta: Delta) -> Json:
        logprobs = self._logprobs(delta.drawn) if delta.drawn else None
        fields = _fields(delta)
        for index, call in enumerate(fields.get("tool_calls", ()), choice.num_calls):
            call["index"] = index
        choice.num_calls += len(delta.calls)
        return self._chunk(choice, fields, logprobs=logprobs)

    def closing(self, choice: Choice) -> Json:
        return self._chunk(choice, {}, finish_reason=choice.finish)

    def usage_only(self, choices: Sequence[Choice]) -> Json:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._frame(kind, []) | {"usage": self._usage(choices)}

    def _chunk(self, choice: Choice, fields: Json, **more: Any) -> Json:
        body: Json = {"index": choice.index, "finish_reason": None, "logprobs": None, **more}
        if self.is_chat:
            return self._frame("chat.completion.chunk", [body | {"delta": fields}])
        return self._frame("text_completion", [body | {"text": fields.get("content", "")}])

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return head | {"choices": choices}

    def _logprobs(self, drawn: Sequence[Drawn]) -> Json:
        if self.is_chat:
            return {
                "content": [
                    self._token(d.token, d.logprob)
                    | {"top_logprobs": [self._token(*one) for one in d.likeliest]}
                    for d in drawn
                ],
                "refusal": None,
            }
        texts = [self.tokenizer.decode([d.token]) for d in drawn]
        return {
            "tokens": texts,
            "token_logprobs": [d.logprob for d in drawn],
            "top_logprobs": [
                {self.tokenizer.decode([token]): logprob for token, logprob in d.likeliest}
                for d in drawn
            ],
        }

    def _token(self, token: int, logprob: float) -> Json:
        text = self.tokenizer.decode([token])
        # a part of a character has bytes that its text does not show
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    def _usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens; a prompt counts once, however many answers it gets."""
        prompt = sum(len(choice.wish.tokens) for choice in choices[:: self.num_answers])
        completion = sum(choice.num_drawn + choice.num_forced for choice in choices)
        thinking = sum(choice.num_reasoning for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": thinking},
        }


def _fields(delta: Delta) -> Json:
    """Of a message, or of a piece of one."""
    fields = {
        "content": delta.text,
        "reasoning_content": delta.reasoning,
        "tool_calls": [_call(call) for call in delta.calls],
    }
    return {name: value for name, value in fields.items() if value}


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
