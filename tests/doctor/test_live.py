"""The loop's own checks, on the real tiny trainer and engine with planted faults."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_lite import build
from miles_lite.build import Parts
from miles_lite.compose import compose
from miles_lite.doctor import live
from miles_lite.doctor.live import Trial
from miles_lite.types import Batch, MicroBatch, TrainSequence, Update

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cfg() -> Any:
    # few tokens a pass: two or three sequences in each
    return compose(["experiment=tiny", "optim.lr=1e-3", "train.max_tokens_per_micro_batch=104"])


@pytest.fixture(scope="module")
def parts(cfg: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """With a learning rate, which `live.check` would have taken away."""
    inputs = build.read(cfg)
    with build.start(cfg, inputs, tmp_path_factory.mktemp("engines")) as parts:
        yield parts


class Leaky:
    """A trainer whose packed sequences see each other, as with boundaries that were forgotten."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.dp = trainer, trainer.dp

    def score(self, batch: Batch) -> Mapping[int, Sequence[float]]:
        (update,) = batch.updates
        leaked = tuple(tuple(map(_leaked, rank)) for rank in update.micro_batches)
        return self._trainer.score(Batch((Update(leaked),)))


def _leaked(micro_batch: MicroBatch) -> MicroBatch:
    first, *rest = micro_batch.sequences
    after: list[TrainSequence] = [first]
    for sequence in rest[:1]:
        after.append(
            replace(
                sequence,
                tokens=(*first.tokens, *sequence.tokens),
                prompt_len=len(first.tokens) + sequence.prompt_len,
            )
        )
    return replace(micro_batch, sequences=tuple(after + rest[1:]))


def _noisy_copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    noise = {k: v + 0.05 * torch.randn_like(v.float()).to(v.dtype) for k, v in weights.items()}
    save_file(noise, folder / "model.safetensors")
    return folder


def test_planted_faults_are_found_each_by_its_check(cfg: Any, parts: Parts, tmp_path: Path) -> None:
    trial = Trial(parts, build.read(cfg).sampling, max_drift=1e-4)
    assert trial.round_trip().status == "ok"

    torch.manual_seed(0)
    noisy = _noisy_copy(cfg.model.path, tmp_path / "noisy")
    for rank in parts.rollout.engines[0].receivers():
        rank.call("load_hf", noisy, deadline_s=60)
    assert trial.answers().status == "ok"
    drift = trial.drift()
    assert drift.status == "failed" and "bound 0.0001" in drift.detail and drift.fix

    moved = trial.learning_rate_0()  # the step above learnt
    assert moved.status == "failed" and "a step changed weights" in moved.detail

    packing = trial.packing()
    assert packing.status == "ok" and "8 sequences in 4 passes" in packing.detail
    trial._parts = replace(parts, trainer=Leaky(parts.trainer))
    assert trial.packing().status == "failed"
    longest = max(len(sequence.tokens) for sequence in trial._sequences)
    trial._parts = replace(parts, packing=replace(parts.packing, max_tokens=longest))
    assert trial.packing().status == "skipped"  # no two fit
    trial._parts = parts

    round_trip = trial.round_trip()
    assert round_trip.status == "failed" and "not the files'" in round_trip.detail


def test_no_gradient_shows_nothing(cfg: Any, parts: Parts) -> None:
    trial = Trial(parts, build.read(cfg).sampling, max_drift=1e-4)
    trial._metrics = {"train/grad_norm": 0.0, "train/lr-pg_0": 0.0}
    found = trial.learning_rate_0()
    assert found.status == "failed" and "nothing is shown" in found.detail


def test_after_a_check_that_could_not_be_made_the_rest_is_skipped(
    cfg: Any, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that are late, on parts that are up already."""
    late = replace(parts.rollout._settings, timeout_s=1e-3)
    monkeypatch.setattr(parts.rollout, "_settings", late)
    monkeypatch.setattr(build, "start", lambda *_: contextlib.nullcontext(parts))
    monkeypatch.setattr(Trial, "round_trip", lambda _: live.ok("weight round trip", "done before"))
    found = list(live.check(cfg, build.read(cfg), 1e-4))
    assert [finding.name for finding in found] == list(live.FIXES)
    assert [f.status for f in found] == ["ok", "ok", "failed", *["skipped"] * 4]
    assert (
        "samples are missing after 0.001 s" in found[2].detail
        and "rollout.timeout_s" in found[2].fix
    )
    assert {f.detail for f in found[3:]} == {"answers failed"}
