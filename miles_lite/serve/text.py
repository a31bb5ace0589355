"""Text as it comes: tokens to text, thinking and answer, tool calls. Pure: no HTTP, no engine.

Whatever arrives in pieces gives the same, joined, as if it had arrived at once.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from miles_lite.rollout.probes import CLOSE, OPEN
from miles_lite.untrusted import parse_json

_TOOL_OPEN, _TOOL_CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
# a value may itself hold "</parameter>": the one that counts stands before the next one, or last
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL
)
_KINDS = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}
_PARTIAL = "\ufffd"  # what a tokenizer decodes an unfinished character to


def cut(text: str, markers: Sequence[str]) -> tuple[str, str, str]:
    """What stands before the first of the markers, that marker, and the rest. Without one: what can
    no longer be part of one, "", and the rest, which may be the beginning of one."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, _, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    for size in range(min(max(map(len, markers), default=0), len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return text[:-size], "", text[-size:]
    return text, "", ""


class TextStream:
    """Tokens to text. A token may end within a character, which then comes with a later one."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []  # the last ones told, for context, and those not told yet
        self._num_told = 0

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text = self._untold()
        if text.endswith(_PARTIAL):
            return ""
        del self._tokens[: self._num_told]
        self._num_told = len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left when no token comes any more."""
        text = self._untold()
        self._num_told = len(self._tokens)
        return text

    def _untold(self) -> str:
        told = self._decode(self._tokens[: self._num_told])
        return self._decode(self._tokens)[len(told) :]


class Reasoning:
    """Parts thinking from the answer, at the marker that closes it.

    opened: whether the prompt has opened a think block. A model that was left the choice opens one
    itself, as the first it writes.
    """

    def __init__(self, opened: bool) -> None:
        self.thinking = opened
        self._held = ""
        self._has_begun = False  # what stands first is known to be a marker, or not
        self._is_fresh = False  # just behind the marker, where line ends are no part of the answer

    def feed(self, text: str) -> tuple[str, str]:
        """(thinking, answer) that this text adds."""
        self._held += text
        if not self._has_begun:
            start = self._held.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return "", ""
            self._has_begun = True
            if start.startswith(OPEN):
                self.thinking, self._held = True, start.removeprefix(OPEN)
        thought = ""
        if self.thinking:
            thought, marker, self._held = cut(self._held, [CLOSE])
            if not marker:
                return thought, ""
            self.thinking, self._is_fresh = False, True
        answer, self._held = self._held, ""
        if self._is_fresh:
            answer = answer.lstrip("\n")
            self._is_fresh = not answer
        return thought, answer

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held, "") if self.thinking else ("", held)


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


class ToolText:
    """Takes tool calls out of an answer; each comes whole, when it is closed. What only looks like
    one stays text."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """tools: the JSON schema of the parameters of each, by name."""
        self._tools = tools
        self._held = self._space = ""
        self._is_inside = False
        self._is_fresh = False  # just behind a call: around calls, space is no part of the answer

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """(text, calls) that this text adds."""
        self._held += text
        told, calls = "", []
        while True:
            wanted = _TOOL_CLOSE if self._is_inside else _TOOL_OPEN
            before, marker, rest = cut(self._held, [wanted])
            if self._is_inside and not marker:
                return told, calls
            self._held = rest
            if not self._is_inside:
                told += self._with_space(before)
            elif call := parse_call(before, self._tools):
                calls.append(call)
                self._space, self._is_fresh = "", True
            else:
                told += self._with_space(_TOOL_OPEN + before + _TOOL_CLOSE)
            if not marker:
                return told, calls
            self._is_inside = not self._is_inside

    def flush(self) -> str:
        opened = _TOOL_OPEN if self._is_inside else ""
        text, self._held, self._space = self._space + opened + self._held, "", ""
        self._is_inside = False
        return text

    def _with_space(self, text: str) -> str:
        """`text`, with the white space at its end kept back until more of the answer comes."""
        text = text.lstrip() if self._is_fresh else self._space + text
        self._is_fresh = self._is_fresh and not text
        told = text.rstrip()
        self._space = text[len(told) :]
        return told


def parse_call(text: str, tools: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """`<function=NAME><parameter=NAME>value</parameter>...</function>`, of a tool that there is."""
    match = _FUNCTION.fullmatch(text)
    if not match or match[1].strip() not in tools:
        return None
    name = match[1].strip()
    types = tools[name].get("properties")
    types = types if isinstance(types, Mapping) else {}
    values = {
        key.strip(): _typed(value, _kinds(types.get(key.strip()), tools[name]))
        for key, value in _PARAMETER.findall(match[2].strip())
    }
    return ToolCall(name, json.dumps(values, ensure_ascii=False))


def _typed(text: str, kinds: Set[str]) -> Any:
    """A parameter's value: text where the schema allows text, else JSON if it is any."""
    text = text.removeprefix("\n").removesuffix("\n")
    value = _read(text)
    is_meant = _kind(value) in kinds & {"null", "array", "object"}  # what hardly is meant as text
    return text if "string" in kinds and not is_meant else value


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "number")


def _kinds(schema: Any, root: Mapping[str, Any]) -> Set[str]:
    """JSON types that the schema of a parameter names; none if it leaves them open. Refs are looked
    up in `root`. Schemas are a client's: one may refer to itself, or be anything else."""
    kinds, seen, todo = set[str](), set[int](), [schema]
    while todo:
        one = todo.pop()
        if not isinstance(one, Mapping) or id(one) in seen:
            continue
        seen.add(id(one))
        for name, value in one.items():
            values = value if isinstance(value, list) else [value]
            if name == "type":
                kinds |= {kind for kind in values if isinstance(kind, str)}
            elif name in ("enum", "const"):
                kinds |= set(map(_kind, values))
            elif name in ("anyOf", "oneOf", "allOf"):
                todo += values
            elif name == "$ref" and isinstance(value, str):
                todo.append(_looked_up(value, root))
    return kinds


def _looked_up(ref: str, root: Any) -> Any:
    """What a "#/$defs/Name" of a schema means."""
    for part in ref.split("/")[1:]:
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def _read(text: str) -> Any:
    """The value that a text spells in JSON, or in Python as models do too. Else the text; also if
    no client could read the value, such as NaN or half of a surrogate pair."""
    for read in (json.loads, _python):
        try:
            spelt = json.dumps(read(text), ensure_ascii=False, allow_nan=False)
            spelt.encode()
            return parse_json(spelt, "a parameter")
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _python(text: str) -> Any:
    if text.strip() in ("True", "False", "None") or text.lstrip().startswith(("[", "{")):
        return ast.literal_eval(text.strip())
    raise ValueError("left to be text, such as 0x10")
