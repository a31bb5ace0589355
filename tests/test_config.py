"""A typo, a wrong type or a missing value is refused with the key's name and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from miles_lite.compose import CONFIGS, build, compose
from miles_lite.config import Config, ConfigError, LogConfig

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


def test_minimal_configuration_builds() -> None:
    cfg = build(Config, MINIMAL, "")
    assert cfg.model.path == Path("model")
    assert cfg.rollout.num_samples == 8


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


SIZES = ("num_prompts", "samples_per_prompt", "global_batch", "updates_per_step")


def with_sizes(prompts: int, samples: int, batch: int, updates: int) -> dict[str, Any]:
    rollout = {"num_prompts": prompts, "samples_per_prompt": samples, "max_response_tokens": 16}
    train = {"num_steps": 2, "global_batch": batch, "updates_per_step": updates}
    return {**MINIMAL, "rollout": rollout, "train": train}


@pytest.mark.parametrize("missing", [None, 0, 1, 2, 3])
def test_any_one_of_the_four_batch_sizes_is_derived(missing: int | None) -> None:
    sizes = [6, 4, 8, 3]  # prompts x samples = batch x updates
    given = [0 if i == missing else size for i, size in enumerate(sizes)]
    cfg = build(Config, with_sizes(*given), "")
    assert [getattr(cfg.rollout, name) for name in SIZES[:2]] == sizes[:2]
    assert [getattr(cfg.train, name) for name in SIZES[2:]] == sizes[2:]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((6, 4, 8, 2), ["num_prompts = 6", "updates_per_step = 2", "does not hold"]),
        ((6, 4, 0, 5), ["no whole number for train.global_batch"]),
        ((0, 7, 8, 3), ["no whole number for rollout.num_prompts"]),
        ((6, 0, 0, 3), ["at most one of them may stay 0"]),
        ((6, -4, 8, 3), ["samples_per_prompt = -4"]),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(
    sizes: tuple[int, int, int, int], words: list[str]
) -> None:
    message = refusal(with_sizes(*sizes))
    for word in words:
        assert word in message


def test_a_path_stands_for_a_source_and_rows_need_no_quotes() -> None:
    cfg = compose(["experiment=tiny", "data.train=some/my.jsonl[:100]", "data.eval="])
    assert {name: source.path for name, source in cfg.data.train.items()} == {
        "my": "some/my.jsonl[:100]"
    }
    assert cfg.data.eval == {}


def test_rewards_by_name() -> None:
    cfg = compose(["experiment=tiny", "reward.others.code={file: a.py, function: run}"])
    assert list(cfg.reward.functions) == ["", "code"]
    assert cfg.reward.functions["code"].file == Path("a.py")
    assert "reward.others.code.fil" in refusal(
        changed("reward", file="f.py", function="f", others={"code": {"fil": "a.py"}})
    )


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
    assert knobs(Config) <= MAX_KNOBS
