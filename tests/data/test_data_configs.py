"""The ready data configurations, on rows of the shape that their data sets have."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from miles_lite.compose import CONFIGS, compose
from miles_lite.config import RewardFunction
from miles_lite.data.source import RenderSettings, open_source
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.rollout.probes import Kind
from miles_lite.rollout.reward_audit import audit
from miles_lite.rollout.rewards import RewardWorkers

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes).\n\nWhat is 17+17?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
MESSAGES = [{"role": "user", "content": DAPO}]
ROWS: dict[str, dict[str, Any]] = {
    "dapo_math_17k": {"prompt": MESSAGES, "label": "34"},
    "dapo_math_17k_original": {
        "data_source": "math_dapo",
        "prompt": MESSAGES,
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    },
    "gsm8k": {
        "question": "What is 17+17?",
        "answer": "Seventeen and seventeen is <<17+17=34>>34.\n#### 34",
    },
}
FITTING = {"dapo_math_17k": "dapo_math", "dapo_math_17k_original": "dapo_math", "gsm8k": "math"}


def test_each_has_its_rows() -> None:
    names = {path.stem for path in (CONFIGS / "data").glob("*.yaml")}
    assert names == {*ROWS, "tiny_arithmetic"}


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_prompts_that_a_fitting_reward_can_grade(
    name: str, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    plain = compose(["experiment=tiny", f"data={name}", "train.max_tokens_per_micro_batch=8192"])
    for split in ("train", "eval"):
        assert all(s.path.startswith("hf:") for s in getattr(plain.data, split).values())
        (source,) = getattr(plain.data, split)
        words = [f"data.{split}.{source}.path={path}", "train.max_tokens_per_micro_batch=8192"]
        cfg = compose(["experiment=tiny", f"data={name}", *words])
        render = RenderSettings(
            tokenizer, {}, cfg.data.max_prompt_tokens, max_too_long_ratio=0.0, rewards={""}
        )
        (prompt,) = open_source("set", getattr(cfg.data, split)[source], render).all()
        assert prompt.label == "34"
        assert "What is 17+17?" in prompt.text
        reward = FITTING[name]
        function = RewardFunction(file=Path(f"rewards/{reward}.py"), function=reward)
        with RewardWorkers({"": function}, 1) as workers:
            (section,) = asyncio.run(audit([prompt], workers, knows_thinking=True))
        asked = "\\boxed{}" if name == "gsm8k" else "Answer:"
        assert section.winning(Kind.right) == [asked]
        assert not section.failure
