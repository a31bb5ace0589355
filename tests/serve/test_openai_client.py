"""What the openai library makes and sends is taken, its own replies too, and it reads what comes.

No small model calls tools: what the model says is planted here; all between its tokens and the
client is real.
"""

from __future__ import annotations

import enum
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel

from miles_lite.compose import CONFIGS
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.serve.choice import Drawn
from miles_lite.serve.live import Inbox, LiveEngine
from miles_lite.serve.server import Served, application
from miles_lite.types import Finish, Request

TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.reasoning_content | default('') }}
{{- message.content + message.tool_call_id | default('') }}
{%- for call in message.tool_calls | default([]) -%}
{{ call.id + '=' + call.function.name }}
{%- for name, value in call.function.arguments.items() -%}
{{ name + '=' + value | string }}
{%- endfor -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}
"""


class Unit(enum.Enum):
    kelvin = "1"
    celsius = "true"


class Place(BaseModel):
    City: str
    Coastal: bool
    Mayor: str | None


class Weather(BaseModel):
    """Tells the weather."""

    place: Place
    note: str | None
    unit: Unit
    other: Unit | None
    days: int
    tags: list[str]


TOOL = openai.pydantic_function_tool(Weather)
SAID = """They ask.</think>I look.
<tool_call>
<function=Weather>
<parameter=place>
{'City': "None's Land", 'Coastal': True, 'Mayor': None}
</parameter>
<parameter=note>
12345
</parameter>
<parameter=unit>
true
</parameter>
<parameter=other>
None
</parameter>
<parameter=days>
3
</parameter>
<parameter=tags>
["NYC", "None"]
</parameter>
</function>
</tool_call>"""
WEATHER = Weather(
    place=Place(City="None's Land", Coastal=True, Mayor=None),
    note="12345",
    unit=Unit.celsius,
    other=None,
    days=3,
    tags=["NYC", "None"],
)
ASK: list[Any] = [{"role": "user", "content": "And the weather?"}]


class Planted(LiveEngine):
    """Of a model that always says the same."""

    tokenizer: ChatTokenizer
    said = SAID
    prompt = ""  # the last one

    def start(self, requests: Sequence[Request], inbox: Inbox) -> None:
        eos = self.model.eos_token_ids[0]
        for request in requests:
            self.prompt = self.tokenizer.decode(request.tokens)
            for token in (*self.tokenizer.encode(self.said), eos):
                finish = Finish.stop if token == eos else None
                inbox.put_nowait(Drawn(request.uid, token, -0.5, (), finish))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, Planted]]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(CONFIGS / "model" / "tiny", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    engine = Planted(folder, EngineOptions(max_running=1, max_seq_len=8000))
    engine.tokenizer = ChatTokenizer.load(folder)
    app = application(Served("tiny", engine.tokenizer, engine, ""))
    with TestClient(app) as http:
        yield (
            openai.OpenAI(
                base_url="http://testserver/v1", api_key="-", max_retries=0, http_client=http
            ),
            engine,
        )


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    asked = {"model": "tiny", "messages": ASK, "tools": [TOOL], **changes}
    return client.chat.completions.create(**asked)


def joined(chunks: Any) -> dict[str, Any]:
    """A message of the chunks of a stream, as clients put it together."""
    whole: dict[str, Any] = {"content": ""}
    for chunk in chunks:
        for name, value in chunk.choices[0].delta.model_dump().items():
            if name in ("content", "reasoning_content"):
                whole[name] = whole.get(name, "") + (value or "")
            elif value is not None:
                whole[name] = value
    return whole


def test_a_tool_made_of_a_class_is_called_with_values_of_its_types(
    served: tuple[openai.OpenAI, Planted],
) -> None:
    client, _ = served
    asked: Any = {"model": "tiny", "messages": ASK, "tools": [TOOL]}
    parsed = client.chat.completions.parse(**asked).choices[0]
    assert parsed.finish_reason == "tool_calls"
    assert (parsed.message.tool_calls or [])[0].function.parsed_arguments == WEATHER
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert (final.tool_calls or [])[0].function.parsed_arguments == WEATHER


def test_replies_of_every_kind_are_taken_back(served: tuple[openai.OpenAI, Planted]) -> None:
    client, engine = served
    asked: Any = {"model": "tiny", "messages": ASK, "tools": [TOOL]}
    whole: ChatCompletionMessage = chat(client).choices[0].message
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    parsed = client.chat.completions.parse(**asked).choices[0].message
    streamed = joined(chat(client, stream=True))
    assert "index" in streamed["tool_calls"][0]  # what no whole reply has
    replies = [
        whole, whole.model_dump(), whole.to_dict(), whole.to_dict() | {"annotations": []},
        final, final.model_dump(mode="json"), parsed, parsed.to_dict(mode="json"), streamed,
    ]  # fmt: skip
    prompts = set()
    for reply in replies:
        shown: Any = reply if isinstance(reply, dict) else reply.model_dump()
        ident = shown["tool_calls"][0]["id"]
        answer = {"role": "tool", "tool_call_id": ident, "content": "fair"}
        chat(client, messages=[*ASK, reply, answer])
        prompts.add(engine.prompt.replace(ident, "ID"))
    assert len(prompts) == 1
    place = "{'City': \"None's Land\", 'Coastal': True, 'Mayor': None}"
    assert f"They ask.I look.ID=Weatherplace={place}note=12345" in prompts.pop()


@pytest.mark.parametrize("stream", [True, False])
def test_only_one_call_if_so_asked(
    served: tuple[openai.OpenAI, Planted], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    client, engine = served
    calls = SAID[SAID.index("<tool_call>") :]
    for said, content in ((f"{SAID}\n{calls}\n", "I look."), (f"hm</think>{calls} {calls}", None)):
        monkeypatch.setattr(engine, "said", said)
        for together, num in ((True, 2), (False, 1)):
            answer = chat(client, parallel_tool_calls=together, stream=stream)
            chunks = list(answer) if stream else [answer]
            parts = [getattr(c.choices[0], "delta" if stream else "message") for c in chunks]
            found = [call for part in parts for call in part.tool_calls or []]
            assert ("".join(part.content or "" for part in parts) or None, len(found)) == (
                content,
                num,
            )
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_template_sees_a_tool_as_the_client_gave_it(
    served: tuple[openai.OpenAI, Planted],
) -> None:
    client, engine = served
    tool: Any = {"type": "function", "function": {"name": "look", "strict": True}}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": ""}}
    chat(client, tools=[tool], messages=[*ASK, {"role": "assistant", "tool_calls": [call]}])
    assert '[{"type": "function", "function": {"name": "look"}}]' in engine.prompt
    assert "assistant\na=look<|im_end|>" in engine.prompt  # no arguments are an empty object
