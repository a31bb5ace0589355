"""A trainer that goes on from a checkpoint trains as one that never stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from miles_lite.config import AlgoConfig
from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.types import Batch
from miles_lite.weights.table import iter_segments
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World, run_ranks
from tests.trainer.test_step import ONE, OPTIM, assemble, batch_for, dims, spec_of
from tests.trainer.test_torch_dist import converted as to_dist


@dataclass(frozen=True)
class Stretch:
    """Load if there is where to load from, train some batches, save where something is to be."""

    spec: WorkerSpec
    batches: tuple[Batch, ...]
    load: Path | None = None
    save: Path | None = None
    same_layout: bool = True
    asynchronous: bool = False  # and go on with a step while it is written
    slow: str = ""  # files of this folder of it take a while


@dataclass(frozen=True)
class Outcome:
    reports: list[dict[str, Any]]  # partials of each step, without times
    logprobs: list[dict[int, list[float]]]
    rows: list[tuple[str, int, int, Any]]


@contextmanager
def slowly(folder: str) -> Iterator[None]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def later(*args: Any, write_bucket: Any, **named: Any) -> None:
        time.sleep(1.0 if folder in Path(write_bucket[0]).parts else 0.0)
        write(*args, write_bucket=write_bucket, **named)

    with mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(later)):
        yield


def live(world: World, stretches: list[Stretch]) -> list[Outcome]:
    """Each stretch by processes that start anew."""
    from miles_lite.trainer.megatron import setup
    from miles_lite.trainer.megatron.worker import MegatronWorker

    done = []
    for port, stretch in zip(world.ports, stretches, strict=False):
        worker = MegatronWorker(stretch.spec, world.rank)
        worker.setup(f"127.0.0.1:{port}")
        if stretch.load:
            worker.load(stretch.load, stretch.same_layout)
        dp_rank = stretch.spec.dims.dp_rank(world.rank)
        reports, logprobs = [], []
        for batch in stretch.batches:
            report = worker.step([update.micro_batches[dp_rank] for update in batch.updates])
            reports.append({k: v for k, v in report.partials.items() if "time" not in k})
            logprobs.append({k: v.tolist() for k, v in report.logprobs.items()})
        if stretch.save:
            stretch.save.mkdir(exist_ok=True)
            with slowly(stretch.slow):
                worker.save(stretch.save, stretch.asynchronous)
            if stretch.asynchronous:
                worker.step([update.micro_batches[dp_rank] for update in batch.updates])
            worker.finish_save()
        rows = [
            (tensor, h.dim, start, worker._weights[h.param].detach().float().narrow(h.dim, off, n))
            for h in worker.hosted()
            for tensor, start, off, n in iter_segments(h)
        ]
        rows = [(tensor, dim, at, values.clone().numpy()) for tensor, dim, at, values in rows]
        done.append(Outcome(reports, logprobs, rows))
        setup.destroy()
    return done


def lives(stretches: list[Stretch]) -> list[list[Outcome]]:
    """[stretch][rank]; all of one world size."""
    size = stretches[0].spec.dims.world_size
    by_rank = run_ranks(size, live, stretches, deadline_s=300)
    return [[by_rank[rank][i] for rank in range(size)] for i in range(len(stretches))]


def weights(outcomes: list[Outcome]) -> dict[str, torch.Tensor]:
    return assemble([row for outcome in outcomes for row in outcome.rows])


def assert_equal(got: list[Outcome], wanted: list[Outcome]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        n = len(ours.reports)
        assert ours.reports == theirs.reports[-n:]
        assert ours.logprobs == theirs.logprobs[-n:]
    ours, theirs = weights(got), weights(wanted)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


WARM = replace(OPTIM, warmup_updates=6)  # a learning rate that is never the same
KL = AlgoConfig(kl_loss_coef=0.1, entropy_coef=0.01)
KINDS = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "offloaded fp32": {"optim": replace(WARM, cpu_offload=True)},
    "offloaded bf16": {"optim": replace(WARM, cpu_offload=True), "dtype": "bf16"},
    "reference": {"algo": KL},
}


def check_going_on(tiny: Tiny, folder: Path, layout: ParallelDims, **changes: Any) -> None:
    """Two steps in one life, and in two with a checkpoint between them: the same to the bit."""
    spec = spec_of(tiny.folder, layout, **{"optim": WARM, **changes})
    batch = batch_for(layout.dp)
    whole, _, resumed = lives(
        [
            Stretch(spec, (batch, batch)),
            Stretch(spec, (batch,), save=folder / "checkpoint"),
            Stretch(spec, (batch,), load=folder / "checkpoint"),
        ]
    )
    assert_equal(resumed, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_exact(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    check_going_on(tiny, tmp_path, ONE, **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_going_on_with_two_ranks_is_exact(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    check_going_on(tiny, tmp_path, dims(dp=2, ep=2), **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "slow"), [("fp32", ""), ("offloaded bf16", ""), ("reference", "policy")]
)
def test_written_meanwhile_it_holds_the_moment_it_was_begun(
    tiny: Tiny, tmp_path: Path, kind: str, slow: str
) -> None:
    """Whatever of it is written last."""
    layout = dims(dp=2, ep=2)
    spec, batch = spec_of(tiny.folder, layout, **{"optim": WARM, **KINDS[kind]}), batch_for(2)
    folder = tmp_path / "checkpoint"
    whole, _, resumed = lives(
        [
            Stretch(spec, (batch, batch)),
            Stretch(spec, (batch,), save=folder, asynchronous=True, slow=slow),
            Stretch(spec, (batch,), load=folder),
        ]
    )
    assert_equal(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (dims(dp=2, ep=2), ONE, "fp32"),
        (ONE, dims(dp=2, ep=2), "fp32"),
        (dims(dp=2, ep=2), dims(tp=2, ep=2), "offloaded bf16"),
        (dims(tp=2, pp=2, dp=2, ep=2), dims(pp=2), "reference"),
        (dims(dp=2), dims(tp=2, pp=2, ep=2), "offloaded fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_layout_goes_on(
    tiny: Tiny, tmp_path: Path, before: ParallelDims, after: ParallelDims, kind: str
) -> None:
    """Weights as they were, and after another step those of the layout that saved."""
    changes = {"optim": WARM, **KINDS[kind]}
    folder = tmp_path / "checkpoint"
    first, batch = spec_of(tiny.folder, before, **changes), batch_for(before.dp)
    saved, whole = lives([Stretch(first, (batch,), save=folder), Stretch(first, (batch, batch))])
    other, batch = spec_of(tiny.folder, after, **changes), batch_for(after.dp)
    loaded, resumed = lives(
        [
            Stretch(other, (), load=folder, same_layout=False),
            Stretch(other, (batch,), load=folder, same_layout=False),
        ]
    )
    ours, theirs = weights(loaded), weights(saved)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    ours, theirs = weights(resumed), weights(whole)
    tolerance = 2e-2 if "bf16" in kind else 1e-5  # the last bit of a bf16 weight of 2 to 4
    assert max((ours[n] - tensor).abs().max() for n, tensor in theirs.items()) <= tolerance


def test_a_checkpoint_without_what_is_needed_says_so(tiny: Tiny, tmp_path: Path) -> None:
    plain = spec_of(tiny.folder, ONE)
    lives([Stretch(plain, (batch_for(1),), save=tmp_path / "plain")])
    with pytest.raises(RuntimeError, match=r"has no reference/: the run that saved it had"):
        lives([Stretch(replace(plain, algo=KL), (), load=tmp_path / "plain")])
    with pytest.raises(RuntimeError, match=r"has no policy/: it is no checkpoint of a trainer"):
        lives([Stretch(plain, (), load=tmp_path)])
    for path in (tmp_path / "plain/policy").iterdir():
        path.unlink()
    converted = to_dist(tiny.folder, tmp_path / "converted")
    shutil.copytree(converted, tmp_path / "plain/policy", dirs_exist_ok=True)
    with pytest.raises(RuntimeError, match="holds weights only and cannot resume the optimizer"):
        lives([Stretch(plain, (), load=tmp_path / "plain")])
