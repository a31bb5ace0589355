"""A slice of a checkpoint holds the chosen layers bit by bit, and is a checkpoint itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miles_lite.compose import CONFIGS
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.conversion import check_tensors
from miles_lite.weights.hf_files import HfFiles
from tools.cut_layers import cut

TINY = CONFIGS / "model/tiny"  # MEM*EM*E with MTP


def test_chosen_layers_come_over_bit_by_bit(tmp_path: Path) -> None:
    out = tmp_path / "slice"
    num_bytes = cut(TINY, out, [0, 1, 3, 4], shard_bytes=100_000)
    model, source, files = NemotronH.from_folder(out), HfFiles(TINY), HfFiles(out)
    assert (model.pattern, model.mtp_pattern, model.num_layers) == ("ME*E", "", 4)
    check_tensors(files, model)
    assert len({stored.file for stored in files.tensors.values()}) > 3
    assert num_bytes == sum(stored.num_bytes for stored in files.tensors.values())
    for new, old in ((0, 0), (1, 1), (2, 3), (3, 4)):
        names = [n for n in files.tensors if n.startswith(f"backbone.layers.{new}.")]
        assert names
        for name in names:
            with (
                files.mapped(name) as ours,
                source.mapped(name.replace(f".{new}.", f".{old}.", 1)) as theirs,
            ):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert (out / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_the_shipped_sizes_are_those_of_the_slice() -> None:
    whole = NemotronH.from_folder(CONFIGS / "model/nemotron3_ultra")
    part = NemotronH.from_folder(CONFIGS / "model/nemotron3_ultra_4layer")
    assert part.pattern == "".join(whole.pattern[layer] for layer in (0, 1, 7, 8))
    for name in NemotronH.__dataclass_fields__:
        if name not in ("pattern", "mtp_pattern"):
            assert getattr(part, name) == getattr(whole, name)


@pytest.mark.parametrize("layers", [[0, 8], [1, 1], [-1]])
def test_layers_that_are_not_there_are_refused(tmp_path: Path, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted different ones of 0 to 7"):
        cut(TINY, tmp_path / "slice", layers, shard_bytes=1 << 20)
    assert not list(tmp_path.iterdir())
