"""What the converter writes is what megatron-core asks for and loads, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.weights.conversion import RELEASE, settle
from miles_lite.weights.convert import ToDist
from miles_lite.weights.torch_dist import extra_states, pieces
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World, run_ranks
from tests.trainer.test_step import ONE, dims, spec_of


def converted(folder: Path, out: Path) -> Path:
    job = ToDist(folder, out, None)
    units, _ = job.prepare()
    for unit in units:
        settle(out, unit, job.convert(unit))
    job.finish(units)
    return out / RELEASE


def load(world: World, folder: Path, layout: ParallelDims, path: Path) -> dict[str, Any]:
    """Weights by the project's own loader are wiped, and loaded again by stock megatron-core."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from miles_lite.trainer.megatron.model import unwrap
    from miles_lite.trainer.megatron.worker import MegatronWorker

    worker = MegatronWorker(spec_of(folder, layout), world.rank)
    worker.setup(f"127.0.0.1:{world.ports[0]}")
    wanted = {name: tensor.detach().clone() for name, tensor in worker._weights.items()}
    for tensor in worker._weights.values():
        tensor.data.fill_(torch.nan)
    module = unwrap(worker._ddp)
    state = {"model": module.sharded_state_dict()}
    keys: dict[str, tuple[int, ...]] = {}
    objects: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for entry in value.values():
                collect(entry)
        elif isinstance(value, ShardedTensor):
            keys[value.key] = tuple(value.global_shape)
        elif isinstance(value, ShardedObject):
            objects.add(value.unique_key)
        elif hasattr(value, "build"):  # of in_proj and conv1d: split on saving
            collect(value.build())
        elif isinstance(value, list):
            for entry in value:
                collect(entry)

    collect(state)
    loaded: Any = dist_checkpointing.load(
        state, str(path), TorchDistLoadShardedStrategy(), strict=StrictHandling.RAISE_UNEXPECTED
    )
    module.load_state_dict(loaded["model"])
    wrong = [n for n, tensor in worker._weights.items() if not torch.equal(tensor, wanted[n])]
    return {"wrong": wrong, "keys": keys, "objects": objects, "num": len(wanted)}


def check(folder: Path, out: Path, layout: ParallelDims) -> list[dict[str, Any]]:
    path = converted(folder, out)
    ranks = run_ranks(layout.world_size, load, folder, layout, path, deadline_s=240)
    assert all(rank["num"] and not rank["wrong"] for rank in ranks), ranks[0]["wrong"]
    return ranks


def test_keys_shapes_and_weights_are_those_of_the_live_model(tiny: Tiny, tmp_path: Path) -> None:
    (rank,) = check(tiny.folder, tmp_path / "out", ONE)
    model = NemotronH.from_folder(tiny.folder)
    ours = {piece.key: piece.global_shape for _, group in pieces(model) for piece in group}
    assert ours == rank["keys"]
    assert rank["objects"] <= set(extra_states(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [dims(tp=2, pp=2, ep=2), dims(tp=4, ep=4), dims(dp=2, ep=2), dims(tp=2, expert_tp=2)],
    ids=["tp2-pp2-ep2", "tp4-ep4", "dp2-ep2", "tp2-etp2"],
)
def test_stock_megatron_loads_it_at_any_layout(
    tiny: Tiny, tmp_path: Path, layout: ParallelDims
) -> None:
    check(tiny.folder, tmp_path / "out", layout)


def test_extra_keys_such_as_mtp_do_not_matter(tmp_path: Path) -> None:
    check(Path("configs/model/tiny").absolute(), tmp_path / "out", ONE)
