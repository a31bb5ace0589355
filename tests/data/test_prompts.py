from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_lite.data.prompts import PromptSource, load_prompts
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.types import Prompt


def row(question: str = "What is 1+2?", label: Any = "3") -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": question}], "label": label}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(path: str, tokenizer: ChatTokenizer, max_prompt_len: int = 100, **keys: Any):
    options: dict[str, Any] = {"prompt_key": "prompt", "label_key": "label", "template_kwargs": {}}
    return load_prompts(path, tokenizer, max_prompt_len=max_prompt_len, **(options | keys))


def test_a_row_becomes_a_prompt(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 2+2?", 4))
    first, second = load(path, tokenizer)
    assert first.text.endswith("What is 1+2?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert first.tokens == tokenizer.encode(first.text)
    assert (first.uid, first.label) == (0, "3")
    assert (second.uid, second.label) == (1, "4")


def test_a_string_is_one_user_turn(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", row(), {"prompt": "What is 1+2?", "label": "3"})
    chat, plain = load(path, tokenizer)
    assert chat.text == plain.text


def test_keys_and_template_kwargs(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "1+2?", "answer": 3.5})
    (prompt,) = load(
        path,
        tokenizer,
        prompt_key="question",
        label_key="answer",
        template_kwargs={"enable_thinking": False},
    )
    assert prompt.text.endswith("<think></think>")
    assert prompt.label == "3.5"


@pytest.mark.parametrize(
    ("ends", "uids"),
    [("1:3", [1, 2]), (":2", [0, 1]), ("3:", [3, 4]), (":", [0, 1, 2, 3, 4]), ("-2:", [3, 4])],
)
def test_slices(tmp_path: Path, tokenizer: ChatTokenizer, ends: str, uids: list[int]) -> None:
    path = write(tmp_path / "a.jsonl", *(row(f"What is {i}+0?", i) for i in range(5)))
    assert [prompt.uid for prompt in load(f"{path}@[{ends}]", tokenizer)] == uids


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ('{"prompt": ', r"a\.jsonl:2: not JSON \(.*\): '\{\"prompt\": "),
        ("[1, 2]", r"a\.jsonl:2: \[1, 2\] is not a JSON object"),
        ({"label": "3"}, r"a\.jsonl:2: no key 'prompt'; the row has 'label'"),
        ({"prompt": "x"}, r"a\.jsonl:2: no key 'label'; the row has 'prompt'"),
        (row(label=None), r"a\.jsonl:2: label = None is neither a string nor a number"),
        (row(label=["3"]), r"a\.jsonl:2: label = \['3'\] is neither"),
        (row(label=True), r"a\.jsonl:2: label = True is neither"),
        (row(label=" "), r"a\.jsonl:2: label = ' ' is empty"),
        (row(""), r"a\.jsonl:2: prompt = .* is empty"),
        ({"prompt": "", "label": "3"}, r"a\.jsonl:2: prompt = '' is empty"),
        ({"prompt": [], "label": "3"}, r"a\.jsonl:2: prompt = \[\] is empty"),
        ({"prompt": 7, "label": "3"}, r"a\.jsonl:2: prompt = 7 is neither a string nor"),
        ({"prompt": [{"role": "user"}], "label": "3"}, r"a\.jsonl:2: prompt = .* is neither"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, tokenizer: ChatTokenizer, bad: Any, complaint: str
) -> None:
    path = write(tmp_path / "a.jsonl", row(), bad)
    with pytest.raises(ValueError, match=complaint):
        load(path, tokenizer)


def test_blank_lines_are_no_rows_but_count_as_lines(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", row(), "", row(label=None))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: label"):
        load(path, tokenizer)
    assert [prompt.uid for prompt in load(f"{path}@[:1]", tokenizer)] == [0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("none.jsonl", "no data file .*none.jsonl"), ("a.csv", "neither .jsonl nor .parquet")],
)
def test_bad_files_are_named(
    tmp_path: Path, tokenizer: ChatTokenizer, name: str, complaint: str
) -> None:
    (tmp_path / "a.csv").write_text("prompt,label\n")
    with pytest.raises(ValueError, match=complaint):
        load(str(tmp_path / name), tokenizer)


def test_an_empty_file_or_slice_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", row())
    with pytest.raises(ValueError, match="holds no prompt to use: no rows"):
        load(f"{path}@[5:]", tokenizer)


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", row(), row("What is 1234+5678?"), row())
    with caplog.at_level(logging.WARNING, logger="miles_lite.data.prompts"):
        prompts = load(path, tokenizer, max_prompt_len=18)
    assert [prompt.uid for prompt in prompts] == [0, 2]
    (record,) = caplog.records
    assert "left out 1 of 3 prompts" in record.getMessage()
    with pytest.raises(ValueError, match=r"all are longer than .* = 5"):
        load(path, tokenizer, max_prompt_len=5)


def test_parquet_equals_jsonl(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row(f"What is {i}+0?", str(i)) for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = load(write(tmp_path / "a.jsonl", *rows) + "@[1:]", tokenizer)
    assert load(f"{tmp_path / 'a.parquet'}@[1:]", tokenizer) == lines


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        load(str(tmp_path / "a.parquet"), tokenizer)


def some_prompts(num: int, label: str = "x") -> list[Prompt]:
    return [Prompt(uid=i, tokens=(i,), text=str(i), label=label) for i in range(num)]


def test_an_epoch_deals_every_prompt_once() -> None:
    source = PromptSource(some_prompts(10), seed=1)
    dealt = [prompt.uid for _ in range(10) for prompt in source.take(3)]  # three epochs
    epochs = [dealt[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # in new order each time


def test_take_may_be_larger_than_an_epoch() -> None:
    dealt = [prompt.uid for prompt in PromptSource(some_prompts(3), seed=1).take(7)]
    assert sorted(dealt[:3]) == sorted(dealt[3:6]) == [0, 1, 2]


def test_seed_decides_the_order() -> None:
    first, same, other = (PromptSource(some_prompts(50), seed=s).take(50) for s in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("num_taken", range(0, 25, 3))
def test_resuming_deals_what_would_have_come(num_taken: int) -> None:
    source = PromptSource(some_prompts(10), seed=3)
    source.take(num_taken)
    state = json.loads(json.dumps(source.state()))
    resumed = PromptSource(some_prompts(10), seed=3)
    resumed.take(4)  # whatever it did before
    resumed.restore(state)
    assert resumed.state() == state
    assert resumed.take(25) == source.take(25)


@pytest.mark.parametrize(
    ("prompts", "seed", "key"),
    [
        (some_prompts(11), 3, "num_prompts"),
        (some_prompts(10, label="y"), 3, "fingerprint"),
        (some_prompts(10)[::-1], 3, "fingerprint"),
        (some_prompts(10), 4, "seed"),
    ],
)
def test_a_position_in_other_data_is_refused(prompts: list[Prompt], seed: int, key: str) -> None:
    state = PromptSource(some_prompts(10), seed=3).state()
    with pytest.raises(ValueError, match=f"cannot resume: .* has {key} = "):
        PromptSource(prompts, seed).restore(state)


def test_a_damaged_position_is_refused() -> None:
    source = PromptSource(some_prompts(10), seed=3)
    with pytest.raises(ValueError, match="lacks epoch"):
        source.restore({k: v for k, v in source.state().items() if k != "epoch"})
    with pytest.raises(ValueError, match="position 11 is out of range"):
        source.restore(source.state() | {"position": 11})


def test_no_prompts_no_source() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSource([], seed=0)
