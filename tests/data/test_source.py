"""A row becomes a prompt, or an error that names file, line, field and value."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_lite.config import ConfigError, SourceConfig
from miles_lite.data import source as source_module
from miles_lite.data.source import RenderSettings, Source, open_source
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.types import Prompt


def row(question: str = "What is 1+2?", label: Any = "3", **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": question}], "label": label, **more}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tokenizer: ChatTokenizer) -> RenderSettings:
    return RenderSettings(
        tokenizer,
        template_kwargs={},
        max_prompt_tokens=100,
        max_too_long_ratio=1.0,
        rewards={"", "exact", "code"},
    )


def load(path: str, settings: RenderSettings, **keys: Any) -> list[Prompt]:
    return open_source("set", SourceConfig(path=path, **keys), settings).all()


def test_a_row_becomes_a_prompt(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 2+2?", 4))
    first, second = load(path, settings)
    assert first.text.endswith("What is 1+2?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert first.tokens == settings.tokenizer.encode(first.text)
    assert (first.uid, first.label, first.reward, first.metadata) == ("set:0", "3", "", {})
    assert (second.uid, second.label) == ("set:1", "4")
    (sliced,) = load(path + "[1:]", settings)
    assert sliced == second  # also its uid: the row's place in the whole file


def test_a_string_is_one_user_turn(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row(), {"prompt": "What is 1+2?", "label": "3"})
    chat, plain = load(path, settings)
    assert chat.text == plain.text


def test_a_template_goes_around_a_text_as_it_is(tmp_path: Path, settings: RenderSettings) -> None:
    hostile = "1+2? {label} {0} {prompt}"
    path = write(tmp_path / "a.jsonl", {"prompt": hostile, "label": "3"})
    (prompt,) = load(path, settings, prompt_template="{prompt} Use \\boxed{}.")
    assert f"{hostile} Use \\boxed{{}}.<|im_end|>" in prompt.text
    with pytest.raises(ValueError, match=r"a\.jsonl:1: prompt_template is for prompts that are te"):
        load(write(tmp_path / "a.jsonl", row()), settings, prompt_template="{prompt}!")


def test_keys_may_reach_into_objects(tmp_path: Path, settings: RenderSettings) -> None:
    nested = {"ask": {"text": "1+2?"}, "reward_model": {"ground_truth": 3.5}, "a.b": "flat"}
    path = write(tmp_path / "a.jsonl", nested)
    (prompt,) = load(path, settings, prompt_key="ask.text", label_key="reward_model.ground_truth")
    assert ("1+2?" in prompt.text, prompt.label) == (True, "3.5")
    (prompt,) = load(path, settings, prompt_key="ask.text", label_key="a.b")
    assert prompt.label == "flat"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no key 'reward_model\.truth'; the row has"):
        load(path, settings, prompt_key="ask.text", label_key="reward_model.truth")


@pytest.mark.parametrize(
    ("label", "told"), [("3", "3"), (3, "3"), (-3.25, "-3.25"), (10**20, "1" + "0" * 20)]
)
def test_labels(tmp_path: Path, settings: RenderSettings, label: Any, told: str) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", row(label=label)), settings)
    assert prompt.label == told


def test_a_label_out_of_a_longer_text(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row(label="1+2 = 3\n#### 3,000"))
    (prompt,) = load(path, settings, label_pattern="#### (.+)")
    assert prompt.label == "3,000"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: label = .* does not match label_pattern = "):
        load(path, settings, label_pattern="Answer: (.+)")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: label = .* is empty"):
        load(path, settings, label_pattern=r"####(\.\d+)?")
    for wrong, complaint in (("#### .+", "has no group"), ("#### (.+", r"missing \), unterm")):
        with pytest.raises(ConfigError, match=f"label_pattern = .*{complaint}"):
            SourceConfig(path=path, label_pattern=wrong)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"label": "3"}, r"no key 'prompt'; the row has 'label'"),
        ({"prompt": "x"}, r"no key 'label'; the row has 'prompt'"),
        (row(label=None), r"label = None is neither a string nor a number"),
        (row(label=["3"]), r"label = \['3'\] is neither"),
        (row(label=True), r"label = True is neither"),
        (row(label=math.nan), r"label = nan is neither"),
        (row(label=-math.inf), r"label = -inf is neither"),
        (row(label=" "), r"label = ' ' is empty"),
        (row(label="\ud83d"), r"label = '\\ud83d' holds half of a surrogate pair"),
        (row("\ud83d"), r"prompt = .* holds half of a surrogate pair"),
        (row(""), r"prompt = .* is empty"),
        ({"prompt": "", "label": "3"}, r"prompt = .* is empty"),
        ({"prompt": [], "label": "3"}, r"prompt = \[\] is neither a string nor a list of chat"),
        ({"prompt": 7, "label": "3"}, r"prompt = 7 is neither a string nor"),
        ({"prompt": [{"role": "user"}], "label": "3"}, r"prompt = .* is neither"),
        (row(metadata=[1]), r"metadata = \[1\] is not an object"),
        (row(metadata="{"), r"metadata: not JSON"),
        (row(metadata={"rm_type": "math"}), r"metadata.rm_type = 'math' is none of reward.others"),
        (row(metadata={"reward": ["exact"]}), r"metadata.reward = \['exact'\] is none of"),
        (row(tools={"name": "f"}), r"tools = .* is not a list"),
        (row(tools=["add"]), r"the chat template makes no prompt of prompt = .*tools = \['add'\]"),
    ],
)
def test_bad_rows_are_named_before_the_run(
    tmp_path: Path, settings: RenderSettings, bad: Any, complaint: str
) -> None:
    path = write(tmp_path / "a.jsonl", row(), bad)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: " + complaint):
        open_source("set", SourceConfig(path=path), settings)


def test_no_rows_at_all_are_refused(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row())
    with pytest.raises(ValueError, match=r"a\.jsonl\[5:\] holds no rows"):
        load(path + "[5:]", settings)


# ------------------------------------------------------------------ what a row may choose


def test_metadata_chooses_the_reward(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(
        tmp_path / "a.jsonl",
        row(),
        row(metadata={"reward": "code", "level": 3}),
        row(metadata='{"rm_type": "code"}'),  # as text, the way parquet files often have it
        row(metadata=None),
    )
    own, chosen, text, none = load(path, settings, reward="exact")
    assert [prompt.reward for prompt in (own, chosen, text, none)] == [
        *("exact", "code", "code", "exact")
    ]
    assert chosen.metadata == {"reward": "code", "level": 3}
    assert none.metadata == {}


def test_a_source_names_a_reward_that_there_is(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row())
    with pytest.raises(ValueError, match="data source set, reward = 'exakt' is none of .* exact"):
        load(path, settings, reward="exakt")


def test_template_arguments_and_tools_reach_the_template(
    tmp_path: Path, settings: RenderSettings
) -> None:
    tool = {"type": "function", "function": {"name": "add_two_numbers", "parameters": {}}}
    path = write(tmp_path / "a.jsonl", row(), row(tools=[tool]))
    template = settings.tokenizer._backend.chat_template
    settings.tokenizer._backend.chat_template = "{{ tools | tojson if tools }}" + template
    try:
        silent = replace(settings, template_kwargs={"enable_thinking": False})
        plain, with_tool = load(path, silent)
    finally:
        settings.tokenizer._backend.chat_template = template
    assert plain.text.endswith("<think></think>")
    assert "add_two_numbers" in with_tool.text and "add_two_numbers" not in plain.text


# ------------------------------------------------------------------ long prompts


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, settings: RenderSettings, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 1234+5678?"), row())
    short = replace(settings, max_prompt_tokens=18)
    with caplog.at_level(logging.WARNING):
        prompts = load(path, short)
    assert [prompt.uid for prompt in prompts] == ["set:0", "set:2"]
    (record,) = caplog.records
    assert "1 of 3 prompts looked at are longer than data.max_prompt_tokens = 18" in (
        record.getMessage()
    )


def test_too_many_long_prompts_are_refused(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 1234+5678?"), row(), row())
    share = replace(settings, max_prompt_tokens=18, max_too_long_ratio=0.25)
    assert len(load(path, share)) == 3
    with pytest.raises(
        ValueError,
        match=r"1 of 4 .* too long, more than .*_ratio = 0\.2: .* = 18; the first is .*jsonl:2 wi",
    ):
        load(path, replace(share, max_too_long_ratio=0.2))
    with pytest.raises(ValueError, match=r"a\.jsonl: no prompt is short enough: .* = 5; the first"):
        load(path, replace(settings, max_prompt_tokens=5))


def test_a_large_set_is_measured_by_a_sample(
    tmp_path: Path, settings: RenderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that the sample missed are found when they are dealt."""
    monkeypatch.setattr(source_module, "MEASURED", 50)
    monkeypatch.setattr(source_module, "PROBES", 20)
    long = [row("What is 1234+5678?") for _ in range(40)]
    path = write(tmp_path / "a.jsonl", *(row() for _ in range(60)), *long)
    calls: list[int] = []
    original = Source.prompt
    monkeypatch.setattr(Source, "prompt", lambda s, i: (calls.append(i), original(s, i))[1])
    short = replace(settings, max_prompt_tokens=18, max_too_long_ratio=0.5)
    opened = open_source("set", SourceConfig(path=path), short)
    assert len(calls) == 20
    with pytest.raises(ValueError, match="prompts looked at are too long"):
        for index in [*range(60, 100), *range(20)]:
            opened.prompt(index)
    with pytest.raises(ValueError, match="8 of 20 prompts looked at are too long"):
        open_source("set", SourceConfig(path=path), replace(short, max_too_long_ratio=0.3))


# ------------------------------------------------------------------ as a whole


def test_the_fingerprint_changes_with_whatever_changes_a_prompt(
    tmp_path: Path, settings: RenderSettings
) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 2+2?", 4))
    plain = SourceConfig(path=path)

    def fingerprint(source: SourceConfig = plain, used: RenderSettings = settings) -> str:
        return open_source("set", source, used).fingerprint

    others = [
        fingerprint(replace(plain, path=path + "[1:]")),
        fingerprint(replace(plain, label_pattern="(.)")),
        fingerprint(replace(plain, reward="exact")),
        fingerprint(used=replace(settings, template_kwargs={"enable_thinking": False})),
        fingerprint(used=replace(settings, max_prompt_tokens=99)),
    ]
    before = fingerprint()
    write(tmp_path / "a.jsonl", row(), row("What is 2+2?", 5))
    assert len({before, fingerprint(), *others}) == 7
    write(tmp_path / "a.jsonl", row(), row("What is 2+2?", 4))
    assert fingerprint() == before


def test_a_sample_is_from_all_over_the_source(tmp_path: Path, settings: RenderSettings) -> None:
    path = write(tmp_path / "a.jsonl", *(row(f"What is {i}+0?", i) for i in range(20)))
    opened = open_source("set", SourceConfig(path=path), settings)
    assert [prompt.label for prompt in opened.sample(4)] == ["0", "5", "10", "15"]
    assert len(opened.sample(1000)) == 20
    long = write(tmp_path / "a.jsonl", *(row("What is 1234+5678?") for _ in range(9)), row())
    opened = open_source("set", SourceConfig(path=long), replace(settings, max_prompt_tokens=18))
    assert [prompt.uid for prompt in opened.sample(2)] == ["set:9"]
