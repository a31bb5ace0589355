"""configs/algo: every recipe composes, with the numbers its paper has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from miles_lite.compose import CONFIGS, compose
from miles_lite.config import AlgoConfig
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules

# what differs from the defaults, and must: read from the papers, not from the files
PUBLISHED: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_deepseekmath": {"eps_clip_high": 0.2, "kl_loss_coef": 0.04},
    "dr_grpo": {"normalize_std": False, "aggregation": "constant", "eps_clip_high": 0.2},
    "dapo": {"aggregation": "token", "overlong_buffer": 4},  # a fifth of 24 tokens
    "gspo": {"policy_loss": "gspo", "eps_clip": 3e-4, "eps_clip_high": 4e-4},
    "cispo": {
        "policy_loss": "cispo",
        "aggregation": "token",
        "eps_clip": 1.0,
        "eps_clip_high": 4.0,
    },
    "rloo": {
        "advantage_estimator": "rloo",
        "aggregation": "constant",
        "aggregation_constant": 1.0,
        "kl_coef": 0.03,
        "kl_loss_type": "k1",
        "eps_clip_high": 0.2,
    },
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "whiten": True,
        "aggregation": "token",
        "kl_coef": 0.01,
        "kl_loss_type": "k1",
        "eps_clip_high": 0.2,
    },
    "reinforce_plus_plus_baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "whiten": True,
        "aggregation": "token",
        "kl_loss_coef": 1e-3,
        "kl_loss_type": "k2",
        "eps_clip_high": 0.2,
    },
}
FILES = sorted(path.stem for path in (CONFIGS / "algo").glob("*.yaml"))


def test_every_recipe_is_known_here_and_in_the_docs() -> None:
    assert sorted(PUBLISHED) == FILES
    docs = (CONFIGS.parent / "docs/algorithms.md").read_text()
    assert all(f"| `{name}` |" in docs for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_has_its_papers_numbers_and_may_run(name: str) -> None:
    cfg = compose(["experiment=tiny", f"algo={name}"])
    assert asdict(cfg.algo) == asdict(AlgoConfig()) | PUBLISHED[name]
    assert cfg.rollout.dynamic_sampling == (name == "dapo")
    rules.check(cfg, NemotronH.from_folder(cfg.model.path))
    assert not rules.warnings(cfg)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"grpo"}))
def test_a_recipe_names_its_source(name: str) -> None:
    assert "arXiv 2" in (CONFIGS / f"algo/{name}.yaml").read_text()


def test_a_recipe_can_be_changed_key_by_key() -> None:
    changed = ["algo.overlong_buffer=3", "rollout.dynamic_sampling=false"]
    cfg = compose(["experiment=tiny", "algo=dapo", *changed])
    assert (cfg.algo.overlong_buffer, cfg.rollout.dynamic_sampling) == (3, False)
    longer = compose(["experiment=tiny", "algo=dapo", "rollout.max_response_tokens=20480"])
    assert longer.algo.overlong_buffer == 4096
