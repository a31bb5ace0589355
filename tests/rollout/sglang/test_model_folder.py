"""The view of a model folder: the same model, in SGLang's spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.rollout.sglang.model_folder import engine_config, engine_folder
from tests.rollout.embedded.helpers import build


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers spells it."""
    folder = tmp_path_factory.mktemp("saved")
    build(folder, n_groups=2)
    assert "linear_attention" in config_of(folder)["layers_block_type"]
    return folder


def test_the_view_is_the_same_model_in_the_other_spelling(saved: Path, tmp_path: Path) -> None:
    view = engine_folder(saved, tmp_path / "view")
    assert NemotronH.from_folder(view) == NemotronH.from_folder(saved)
    config = config_of(view)
    assert config["hybrid_override_pattern"] == "MEM*-E"
    assert config["n_groups"] == config["mamba_n_groups"] == 2
    assert not {"layers_block_type", "mtp_layers_block_type", "time_step_limit"} & set(config)
    assert config["layer_norm_epsilon"] == 1e-5


def test_everything_but_the_config_is_linked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = config_of(saved)
    monkeypatch.chdir(saved.parent)  # a relative path must not make dangling links
    view = engine_folder(Path(saved.name), tmp_path / "a" / "view")
    assert {file.name for file in view.iterdir()} == {file.name for file in saved.iterdir()}
    for file in view.iterdir():
        assert file.is_symlink() == (file.name != "config.json")
        assert file.stat().st_size > 0
    assert config_of(saved) == before
    with pytest.raises(FileExistsError):
        engine_folder(saved, view)


def test_what_sglang_would_fill_with_defaults_is_spelled_out(saved: Path) -> None:
    """head_dim would be 128, mamba_n_groups 8, the layer list that of an old model."""
    raw = {**config_of(saved), "norm_eps": 1e-6}
    for key in ("head_dim", "layer_norm_epsilon"):
        raw.pop(key, None)
    config = engine_config(raw, NemotronH.from_hf(raw))
    assert config["head_dim"] == 16
    assert config["layer_norm_epsilon"] == 1e-6
    assert config["num_nextn_predict_layers"] == 0


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.*no config.json"):
        engine_folder(tmp_path / "nothing", tmp_path / "view")
