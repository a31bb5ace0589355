"""Every reward, loaded from its file as a worker does: by path, into a package of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_lite.rollout.reward_worker import judge, load_reward

REWARDS = Path(__file__).parents[2] / "rewards"
RIGHT = "so</think>\\boxed{a+b}\nAnswer: 34"


@pytest.mark.parametrize(
    ("file", "options", "label", "reward"),
    [
        ("deepscaler", {}, "b+a", 1.0),
        ("math", {}, "b+a", 1.0),
        ("dapo_math", {}, "34", 1.0),
        ("dapo_math", {"strict": True}, "34", -1.0),
        ("math_verify", {}, "b+a", 1.0),  # imports the library of its own name
        ("exact", {"marker": "Answer:"}, "34", 1.0),
        ("brevity", {"slope": 0.2}, "b+a", 1.0),
    ],
)
def test_rewards_load_and_judge(
    file: str, options: dict[str, Any], label: str, reward: float
) -> None:
    loaded = load_reward(REWARDS / f"{file}.py", file, options)
    assert judge(loaded, [RIGHT], label, {}) == [(reward, "")]
    assert loaded.by_group == (file == "brevity")


@pytest.mark.parametrize("function", ["remote", "remote_group"])
def test_a_service_needs_its_address_and_asks_for_the_whole_row(function: str) -> None:
    with pytest.raises(ValueError, match="url"):
        load_reward(REWARDS / "remote.py", function)
    loaded = load_reward(REWARDS / "remote.py", function, {"url": "ftp://127.0.0.1"})
    assert loaded.wants == ("prompt", "metadata")
    extras = {"prompt": "2+2?", "metadata": {}}
    assert judge(loaded, ["4"], "4", extras) == [(0.0, "error: ValueError")]
