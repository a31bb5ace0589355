"""Keys and values of other frameworks are answered with ours, and the docs say the same."""

from __future__ import annotations

import re

import pytest

from miles_lite import foreign
from miles_lite.compose import CONFIGS, all_keys, compose
from miles_lite.config import Config, ConfigError

KEYS = set(all_keys(Config))
SECTIONS = {key.split(".")[0] for key in KEYS}
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (CONFIGS.parent / "docs/algorithms.md").read_text().splitlines()
    if line.count("|") == 6 and "`" in line
]


def keys_named_in(text: str) -> list[str]:
    found = re.findall(r"\b[a-z]+(?:\.[a-zA-Z_0-9]+)+", text)
    return [re.sub(r"\.NAME\..*", "", key) for key in found if key.split(".")[0] in SECTIONS]


@pytest.mark.parametrize("name", foreign.KEYS)
def test_every_answer_names_a_key_that_there_is(name: str) -> None:
    named = keys_named_in(foreign.KEYS[name])
    assert named
    for key in named:
        assert key in KEYS, key


def test_values_are_those_of_keys_that_there_are() -> None:
    assert set(foreign.VALUES) <= KEYS
    for key, answers in foreign.VALUES.items():
        for answer in answers.values():
            value = answer.split(":")[0].split(" with ")[0]
            if "=" not in value and value != "none":
                compose(["experiment=tiny", f"{key}={value}", "algo.whiten=true"])


def test_the_table_of_the_docs_says_the_same() -> None:
    assert len(TABLE) > 20
    for *theirs, ours in TABLE:
        (key,) = keys_named_in(ours)
        for name in re.findall(r"`(\w+)`", " ".join(theirs)):
            assert key in foreign.own_key(name), name


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("algo.clip_ratio_high=0.3", "unknown key algo.clip_ratio_high; here it is algo.eps_clip_"),
        ("actor_rollout_ref.actor.clip_ratio_c=3", "here it is algo.eps_clip_c"),
        ("--rollout-batch-size=32", "here it is rollout.num_prompts"),
        ("--use-tis", "write key=value, here algo.correction.weight=token"),
        ("actor.kl_loss_coef=0.1", "here it is algo.kl_loss_coef"),
        ("algo.advantage_estimator=gspo", "algo.policy_loss=gspo with grpo here"),
        ("algo.aggregation=token-mean", "token here"),
    ],
)
def test_errors_show_the_way(override: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(answer)):
        compose(["experiment=tiny", override])
