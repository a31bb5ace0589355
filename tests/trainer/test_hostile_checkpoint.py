"""A checkpoint from elsewhere is read, never run: pickles in each of its files, planted."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.weights.torch_dist import DistCheckpoint
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World, run_ranks
from tests.trainer.test_step import ONE, batch_for, spec_of

if TYPE_CHECKING:
    from miles_lite.trainer.megatron.worker import MegatronWorker

PLACES = ("policy/.metadata", "random/rank_00000.pt", "chunk")


def flip(file: Path) -> None:
    file.write_bytes(
        bytes(byte ^ (0x55 * (at % 37 == 0)) for at, byte in enumerate(file.read_bytes()))
    )


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "gone": Path.unlink,
}


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def plant(folder: Path, place: str, evil: Evil) -> None:
    if place == "policy/.metadata":
        (folder / place).write_bytes(pickle.dumps(evil))
    elif place != "chunk":
        torch.save(evil, folder / place)
    else:  # in the place of an object, which torch unpickles on its own way
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        metadata = pickle.loads((folder / "policy/.metadata").read_bytes())
        held = {
            index.fqn: where
            for index, where in metadata.storage_data.items()
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
        }
        payload = io.BytesIO()
        torch.save(evil, payload, _use_new_zipfile_serialization=False)
        roomy = [where for where in held.values() if where.length >= len(payload.getvalue())]
        assert roomy, {name: where.length for name, where in held.items()}
        for where in roomy:
            with (folder / "policy" / where.relative_path).open("r+b") as file:
                file.seek(where.offset)
                file.write(payload.getvalue())


def attack(world: World, spec: WorkerSpec, folder: Path, canary: Path) -> dict[str, str]:
    """What loading says, by the place of the pickle."""
    from miles_lite.trainer.megatron.worker import MegatronWorker

    worker = MegatronWorker(spec, world.rank)
    worker.setup(f"127.0.0.1:{world.ports[0]}")
    worker.step([update.micro_batches[0] for update in batch_for(1).updates])
    sound = folder / "sound"
    sound.mkdir()
    worker.save(sound)
    worker.finish_save()
    worker.load(sound, True)
    said = {}
    for place in PLACES:
        hostile = Path(shutil.copytree(sound, folder / place.replace("/", "-")))
        plant(hostile, place, Evil(canary))
        said[place] = refusal(worker, hostile)
    for file in (path.relative_to(sound) for path in sound.rglob("*.*") if path.is_file()):
        for how, damage in DAMAGES.items():
            damaged = Path(shutil.copytree(sound, folder / f"{how}-{file.name}"))
            damage(damaged / file)
            said[f"{how}-{file.name}"] = refusal(worker, damaged)
    return said


def refusal(worker: MegatronWorker, folder: Path) -> str:
    """What loading says; where it is no ValueError that fails the rank."""
    try:
        worker.load(folder, True)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.slow
def test_what_is_hostile_or_damaged_is_refused_and_not_run(tiny: Tiny, tmp_path: Path) -> None:
    """The manifest is no help here: whoever writes such files writes their hashes, too."""
    canary = tmp_path / "canary"
    [said] = run_ranks(1, attack, spec_of(tiny.folder, ONE), tmp_path, canary)
    assert not canary.exists()
    assert len(said) == len(PLACES) + 6 * len(DAMAGES), said
    for what, told in said.items():
        assert str(tmp_path / what.replace("/", "-")) in told, said
        if ".metadata" not in what:
            assert "if it is damaged, remove " in told and len(told) < 600, said
    assert "mkdir, which is no part of a checkpoint" in said["policy/.metadata"]


def test_nor_by_the_converter(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(ValueError, match=r"mkdir, which is no part of a checkpoint"):
        DistCheckpoint(tmp_path)
    assert not canary.exists()
