"""Text in pieces: whatever the pieces are, the whole is the same; and tool calls are read right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_lite.compose import CONFIGS
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.serve.choice import Choice, Delta, Drawn, Wish
from miles_lite.serve.text import Reasoning, TextStream, ToolCall, ToolText, cut, parse_call
from miles_lite.types import Finish, Sampling

TOOLS = {
    "weather": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "object"},
        }
    }
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n17\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
WEATHER = ToolCall("weather", '{"city": "17", "days": 3}')


def pieces(text: str, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while text:
        size = rng.randint(1, 7)
        yield text[:size]
        text = text[size:]


def test_cut_finds_the_first_marker_and_holds_back_what_may_become_one() -> None:
    assert cut("one STOP two", ["two", "STOP"]) == ("one ", "STOP", " two")
    assert cut("one ST", ["STOP"]) == ("one ", "", "ST")
    assert cut("one STO!", ["STOP"]) == ("one STO!", "", "")
    assert cut("aXYZ", ["XY", "XYZ"]) == ("a", "XYZ", "")  # the longer of two that begin together
    assert cut("anything", []) == ("anything", "", "")


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_tokens_within_characters_give_no_broken_text(text: str) -> None:
    def decode(tokens) -> str:  # a byte a token, as byte-level tokenizers fall back to
        return bytes(tokens).decode("utf-8", "replace")

    stream = TextStream(decode)
    told = [stream.feed(byte) for byte in text.encode("utf-8", "surrogatepass")]
    whole = decode(text.encode("utf-8", "surrogatepass"))
    assert "".join(told) + stream.flush() == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in told)


@pytest.mark.parametrize(
    ("opened", "text", "thinking", "answer"),
    [
        (True, "17 is prime</think>\n\nYes < no", "17 is prime", "Yes < no"),
        (True, "<think>\nonce more</think>Yes", "\nonce more", "Yes"),
        (True, "never over </thin", "never over </thin", ""),
        (False, "<think>hm</think>Yes", "hm", "Yes"),
        (False, "just <think>ing", "", "just <think>ing"),
        (False, "<thi", "", "<thi"),
        (False, "", "", ""),
    ],
)
def test_thinking_is_parted_from_the_answer(
    opened: bool, text: str, thinking: str, answer: str
) -> None:
    for seed in range(20):
        split = Reasoning(opened)
        told = [*(split.feed(piece) for piece in pieces(text, seed)), split.flush()]
        assert ("".join(t for t, _ in told), "".join(a for _, a in told)) == (thinking, answer)


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        (f"I look.\n\n{CALL}\n", "I look.", [WEATHER]),
        (f"{CALL}\n{CALL}", "", [WEATHER, WEATHER]),
        (f"{CALL}\nDone. ", "Done. ", [WEATHER]),
        ("a <tool_call> of a bird", "a <tool_call> of a bird", []),
        (CALL.replace("weather", "no_tool"), CALL.replace("weather", "no_tool"), []),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("3 < 4 ", "3 < 4 ", []),
    ],
)
def test_tool_calls_are_taken_out(text: str, answer: str, calls: list[ToolCall]) -> None:
    for seed in range(20):
        tools, told, found = ToolText(TOOLS), "", []
        for piece in pieces(text, seed):
            more, new = tools.feed(piece)
            told += more
            found += new
        assert (told + tools.flush(), found) == (answer, calls)


def test_values_follow_the_schema() -> None:
    body = (
        "<function=weather><parameter=city>\nSão </parameter> 'x'\n</parameter>"
        '<parameter=units>{"deg": true}</parameter><parameter=days>many</parameter>'
        "<parameter=extra>True</parameter></function>"
    )
    call = parse_call(body, TOOLS)
    assert call is not None
    assert json.loads(call.arguments) == {
        "city": "São </parameter> 'x'",
        "units": {"deg": True},
        "days": "many",  # not what was asked for: the caller sees what the model said
        "extra": True,
    }


TEXT, NULL, LIST = {"type": "string"}, {"type": "null"}, {"type": "array"}
DEFS = {"Color": {"enum": ["1", "true"]}, "Loop": {"$ref": "#/$defs/Loop"}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        # text, wherever it may be text
        ({"anyOf": [TEXT, NULL]}, "12345", "12345"),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"oneOf": [{"type": "integer"}, TEXT]}, "1", "1"),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": "True"}, "True", "True"),
        ({"$ref": "#/$defs/Color"}, "true", "true"),
        ({"anyOf": [{"allOf": [{"$ref": "#/$defs/Color"}]}, NULL]}, "1", "1"),
        (TEXT, "null", "null"),
        (TEXT, "['a']", "['a']"),
        # but for what hardly is meant as text
        ({"anyOf": [TEXT, NULL]}, "None", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [TEXT, LIST]}, "['a', \"b\"]", ["a", "b"]),
        # as the model wrote it
        ({}, "{'City': 'New None', \"Metric\": True}", {"City": "New None", "Metric": True}),
        (LIST, "('a',)", "('a',)"),
        ({"enum": [1, 2]}, "2", 2),
        ({"type": "number"}, "True", True),
        ({}, "0x10", "0x10"),
        ({}, "'quoted'", "'quoted'"),
        # what says nothing
        ({"$ref": "#/$defs/Loop"}, "1", 1),
        ({"$ref": "#/$defs/None/of/these"}, "1", 1),
        ({"type": [["string"]], "anyOf": 3, "$ref": []}, "1", 1),
    ],
)
def test_a_value_is_text_where_it_may_be(schema: Any, text: str, value: Any) -> None:
    tools = {"f": {"$defs": DEFS, "properties": {"x": schema}}}
    call = parse_call(f"<function=f><parameter=x>\n{text}\n</parameter></function>", tools)
    assert call is not None
    assert json.loads(call.arguments) == {"x": value}


@pytest.mark.parametrize(
    "value",
    [
        *("[" * 100_000, "[" * 500 + "]" * 500, "[" * 150 + "]" * 150),
        *("NaN", "-Infinity", '"\\ud800"', "9" * 5000),
        # no JSON, and as Python too much, or nothing that JSON knows
        *("[" + "-" * 100_000 + "1]", "[" + "1+" * 100_000 + "1]", "[" + "not " * 50_000 + "1]"),
        *("[" + "1 if 1 else " * 50_000 + "1]", "[" + "(" * 100_000, "[a" + ".a" * 100_000 + "]"),
        *("{1, 2}", "{(1, 2): 3}", "[b'x']", "[1j]", "[1e999]", "['\\ud800']", "[x for x in 'a']"),
    ],
)
@pytest.mark.parametrize("schema", [{}, {"properties": [1]}, {"properties": {"x": [[1]]}}])
def test_what_no_client_can_read_stays_text(value: str, schema: dict[str, Any]) -> None:
    call = parse_call(f"<function=f><parameter=x>{value}</parameter></function>", {"f": schema})
    assert call is not None
    assert json.loads(call.arguments.encode()) == {"x": value}


# ------------------------------------------------------------------ a choice, of planted tokens


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(CONFIGS / "model" / "tiny")


EOS = 3
SAMPLING = Sampling(0, max_new_tokens=400, temperature=1, top_p=1, top_k=0, stop_token_ids=(EOS,))


def told(choice: Choice, tokenizer: ChatTokenizer, text: str) -> Delta:
    """What a choice tells of a model that writes `text` and ends."""
    tokens = [*tokenizer.encode(text), EOS]
    total = Delta()
    for token in tokens:
        finish = Finish.stop if token == EOS else None
        choice.take(Drawn(0, token, -0.5, (), finish), total)
        if choice.finish:
            break
    return total


def test_a_choice_that_thinks_and_calls(tokenizer: ChatTokenizer) -> None:
    wish = Wish((1,), SAMPLING, (), False, is_chat=True, thinks=True, tools=TOOLS)
    choice = Choice(0, wish, tokenizer)
    whole = told(choice, tokenizer, f"what now</think>\nI look.\n{CALL}")
    assert (whole.reasoning, whole.text, whole.calls) == ("what now", "I look.", [WEATHER])
    assert choice.finish == "tool_calls"
    assert choice.num_reasoning == len(tokenizer.encode("what now</think>"))
    unparted = Choice(0, replace(wish, parts_reasoning=False), tokenizer)
    assert told(unparted, tokenizer, "hm</think>Yes").text == "hm</think>Yes"


def test_a_stop_string_spans_tokens_and_what_looked_like_one_is_told(
    tokenizer: ChatTokenizer,
) -> None:
    wish = Wish((1,), SAMPLING, ("67!", "nine"), False)
    choice = Choice(0, wish, tokenizer)
    assert told(choice, tokenizer, "5676 67! 8").text == "5676 "
    assert (choice.finish, choice.num_drawn) == ("stop", 8)
    assert told(Choice(0, wish, tokenizer), tokenizer, "ends in ni").text == "ends in ni"
