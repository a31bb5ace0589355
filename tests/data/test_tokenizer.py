from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import pytest

from miles_lite.data.tokenizer import ChatTokenizer

QUESTION = [{"role": "user", "content": "What is 17+58?"}]
TURN = "<|im_start|>user\nWhat is 17+58?<|im_end|>\n<|im_start|>assistant\n"


def test_generation_prompt_opens_the_think_block(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render(QUESTION, {}) == TURN + "<think>\n"


def test_template_kwargs_reach_the_template(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render(QUESTION, {"enable_thinking": False}) == TURN + "<think></think>"


def test_render_keeps_every_turn(tokenizer: ChatTokenizer) -> None:
    chat = [{"role": "system", "content": "Add."}, *QUESTION]
    assert tokenizer.render(chat, {}) == (
        "<|im_start|>system\nAdd.<|im_end|>\n" + TURN + "<think>\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        TURN + "<think>\n17+58=75</think>\\boxed{75}<|im_end|>",
        " two  spaces , a user's assistant; What is is? \n\n",
        string.printable[: string.printable.index("\t")],  # digits, letters, punctuation, space
        "",
    ],
)
def test_round_trip_is_exact(tokenizer: ChatTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_markers_are_single_tokens(tokenizer: ChatTokenizer) -> None:
    for text in (*string.digits, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "\\boxed{"):
        assert len(tokenizer.encode(text)) == 1, text
    assert len(tokenizer.encode("17+58=75</think>\\boxed{75}<|im_end|>")) == 14


def test_encode_adds_no_special_tokens(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.encode("1") + tokenizer.encode("2") == tokenizer.encode("12")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        ChatTokenizer.load(tmp_path / "nowhere")


def test_folder_without_tokenizer_is_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer"):
        ChatTokenizer.load(tmp_path)
    shutil.copy(tiny_model / "config.json", tmp_path)  # a model, but no tokenizer
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer"):
        ChatTokenizer.load(tmp_path)


def test_tokenizer_without_template_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_max_length": []}, "holds no tokenizer that can be read"),
        ({"chat_template": 3}, "the chat template in .* is a int"),
        ({"chat_template": {"default": "{{ 1 }}"}}, "the chat template in .* is a dict: name one"),
    ],
)
def test_values_that_no_tokenizer_has(
    tmp_path: Path, tiny_model: Path, change: dict[str, object], told: str
) -> None:
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    config = json.loads((tiny_model / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=told):
        ChatTokenizer.load(tmp_path)
