"""A typo, a wrong type or a missing value is refused with the key's name and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from miles_lite.config import CONFIGS, Config, ConfigError, LogConfig, build, compose

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
MAX_KNOBS = 120

# The smallest configuration: every value that has no default.
MINIMAL: dict[str, Any] = {
    "experiment": "test",
    "model": {"path": "model"},
    "train": {"num_steps": 2, "global_batch": 8},
    "data": {"train": "train.jsonl"},
    "rollout": {"num_prompts": 4, "samples_per_prompt": 2, "max_response_tokens": 16},
    "reward": {"file": "reward.py", "function": "score"},
}


def changed(section: str, **values: Any) -> dict[str, Any]:
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Config, raw, "")
    return str(caught.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_experiments_compose(experiment: str) -> None:
    cfg = compose([f"experiment={experiment}"])
    assert cfg.experiment == experiment
    assert cfg.reward.file.is_file()


def test_overrides_reach_their_knob() -> None:
    cfg = compose(["experiment=tiny", "train.num_steps=3", "optim.lr=2e-5", "log.name=x"])
    assert (cfg.train.num_steps, cfg.optim.lr, cfg.log.name) == (3, 2e-5, "x")


def test_a_group_can_be_swapped_and_a_free_section_extended() -> None:
    cfg = compose(["experiment=tiny", "parallel=laptop", "+data.template_kwargs.think=true"])
    assert cfg.parallel.dp == 2
    assert cfg.data.template_kwargs == {"think": True}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["experiment=NAME", "tiny"]),
        (["experiment=tini"], ["'tini'", "did you mean tiny"]),
        (["experiment=tiny", "train.num_step=3"], ["train.num_step", "train.num_steps"]),
        (["experiment=tiny", "tran.num_steps=3"], ["unknown key tran.num_steps"]),
        (["experiment=tiny", "train.num_steps"], ["train.num_steps", "key=value"]),
        (["experiment=tiny", "train.num_steps=many"], ["train.num_steps", "'many'", "int"]),
        (["experiment=tiny", "train.num_steps=0"], ["train", "num_steps = 0", "at least 1"]),
        (["experiment=tiny", "model.path=???"], ["model.path=..."]),
        (["experiment=tiny", "model=none_such"], ["none_such"]),
    ],
)
def test_a_bad_override_is_explained(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    for word in words:
        assert word in str(caught.value)


def test_minimal_configuration_builds() -> None:
    cfg = build(Config, MINIMAL, "")
    assert cfg.model.path == Path("model")
    assert cfg.rollout.num_samples == 8


def test_unknown_key_names_the_nearest() -> None:
    assert refusal(changed("optim", xyz=1)) == "unknown key optim.xyz"
    message = refusal(changed("optim", weight_deca=1))
    assert message == "unknown key optim.weight_deca; did you mean weight_decay?"


def test_missing_value_says_how_to_set_it() -> None:
    assert "train.num_steps=..." in refusal({**MINIMAL, "train": {"global_batch": 8}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "num_steps", "3"),
        ("train", "num_steps", 3.0),
        ("train", "num_steps", True),
        ("optim", "lr", "fast"),
        ("optim", "lr", True),
        ("log", "samples", 1),
        ("model", "dtype", "fp16"),
        ("data", "template_kwargs", [1]),
        ("reward", "file", 3),
    ],
)
def test_wrong_type_names_key_and_value(section: str, key: str, value: Any) -> None:
    message = refusal(changed(section, **{key: value}))
    assert f"{section}.{key}" in message
    assert repr(value) in message


def test_section_must_be_a_section() -> None:
    assert refusal({**MINIMAL, "optim": 3}).startswith("optim = 3")


def test_an_integer_will_do_for_a_float() -> None:
    lr = build(Config, changed("optim", lr=1), "").optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("algo", {"eps_clip": 0.3, "eps_clip_high": 0.2}, ["eps_clip", "0.3", "0.2"]),
        ("algo", {"eps_clip_c": 0.5}, ["eps_clip_c", "0.5", "0 for off"]),
        ("rollout", {"temperature": 0.0}, ["temperature", "0.0"]),
        ("rollout", {"engine": {"tp": 4, "dp": 3}}, ["dp = 3", "tp = 4"]),
        (
            "train",
            {"max_sequence_tokens": 10, "max_tokens_per_micro_batch": 20},
            ["max_sequence_tokens = 10", "max_tokens_per_micro_batch = 20"],
        ),
        ("parallel", {"ep": 0}, ["parallel", "ep = 0"]),
    ],
)
def test_a_wrong_combination_names_both_values(
    section: str, values: dict[str, Any], words: list[str]
) -> None:
    message = refusal(changed(section, **values))
    for word in words:
        assert word in message


def test_configuration_is_frozen() -> None:
    cfg = build(Config, MINIMAL, "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.num_steps = 5  # pyright: ignore
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        cfg.log.colour = "red"  # pyright: ignore


def knobs(cls: Any) -> int:
    hints = get_type_hints(cls)
    return sum(
        knobs(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else 1
        for f in dataclasses.fields(cls)
    )


def test_knob_budget() -> None:
    assert knobs(LogConfig) == 4  # the counter counts
    assert knobs(Config) < MAX_KNOBS
