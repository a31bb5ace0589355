"""`miles-lite convert hf-to-dist | dist-to-hf | verify` and `miles-lite export`."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from miles_lite.checkpoints import Checkpoint, read_checkpoint
from miles_lite.claim import flat
from miles_lite.cluster.rendezvous import open_store
from miles_lite.intact import file_digest
from miles_lite.orphan import die_with
from miles_lite.untrusted import short
from miles_lite.weights.conversion import (
    PROGRESS,
    Report,
    Unit,
    check_resources,
    done,
    intact,
    peak_rss,
    settle,
    share,
)
from miles_lite.weights.convert import ToDist, ToHf, verify
from miles_lite.weights.hf_files import HfFiles

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
PORT = 29522  # where ranks meet on the head
POLL_S = 0.5


def run(words: Sequence[str]) -> None:
    """Raises ValueError with one sentence that says what was wrong, and the way out."""
    options = _parser().parse_args(words)
    begin = time.monotonic()
    if options.action == "verify":
        checked = _verify(options.hf, options.dist)
    elif options.action == "hf-to-dist":
        job = ToDist(options.hf, options.out, DTYPES[options.dtype])
        checked = _convert(job, options)
    else:
        job = ToHf(options.dist, options.hf_template, options.out)
        checked = _convert(job, options)
    _closing(checked, time.monotonic() - begin)


def export(words: Sequence[str]) -> None:
    """`export RUN[@STEP] --out DIR`: a checkpoint of a run as an HF folder."""
    parser = argparse.ArgumentParser(prog="miles-lite export")
    parser.add_argument("run", help="folder of a run, RUN or RUN@STEP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(words)
    begin = time.monotonic()
    reports = export_hf(find_checkpoint(options.run), options.out, options.workers)
    _closing(reports, time.monotonic() - begin)


def model_folder(model: str) -> Path:
    """An HF folder: `model` itself, or of a checkpoint where it is RUN or RUN@STEP, exported into
    RUN/exports once. Raises ValueError."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    folder = model if Path(model).is_dir() else model.partition("@")[0]
    if not (Path(folder) / "checkpoints").is_dir():
        raise ValueError(
            f"{model} is neither an HF folder (no config.json) nor a run (no checkpoints)"
        )
    found = find_checkpoint(model)
    manifest = file_digest(found.folder / "manifest.json")  # a step may be trained again
    out = found.folder.parent.parent / "exports" / f"{found.folder.name}-{manifest[:8]}"
    export_hf(found, out, 1)
    return out


def find_checkpoint(run: str) -> Checkpoint:
    """Of RUN@STEP, or the last one of RUN; intact. Raises ValueError."""
    folder, _, step = run.rpartition("@")
    if not folder or Path(run).is_dir():  # whatever it is called
        folder, step = run, ""
    checkpoints = Path(folder) / "checkpoints"
    tracker = checkpoints / "latest"
    if not tracker.is_file():
        raise ValueError(f"{folder} has no checkpoint: {tracker} is not there")
    name = f"step_{int(step):06d}" if step.isdecimal() else step or tracker.read_text().strip()
    if not (checkpoints / name / "manifest.json").is_file():
        raise ValueError(f"{checkpoints} has no {name}; there are {_kept(checkpoints)}")
    try:
        return read_checkpoint(checkpoints / name, _digests)
    except ValueError as error:
        raise ValueError(
            f"{checkpoints / name} is damaged: {error}; RUN@STEP takes another one of "
            f"{_kept(checkpoints)}"
        ) from None


def export_hf(found: Checkpoint, out: Path, workers: int) -> list[Report]:
    """Write the policy of a run's checkpoint as an HF folder."""
    path = flat(found.state["config"]).get("model.path")
    if not isinstance(path, str):
        raise ValueError(f"{found.folder / 'state.json'} has config.model.path = {short(path)}")
    template = Path(path)
    alone = argparse.Namespace(node_rank=0, num_nodes=1, head_ip="", timeout=600.0, workers=workers)
    return _convert(ToHf(found.folder / "policy", template, out), alone)


def _kept(checkpoints: Path) -> str:
    return ", ".join(sorted(path.name for path in checkpoints.glob("step_*")))


def _digests(folder: Path, files: Sequence[str]) -> dict[str, str]:
    return {file: file_digest(folder / file) for file in files}


def _verify(hf: Path, dist: Path) -> list[Report]:
    total = sum(stored.num_bytes for stored in HfFiles(hf).tensors.values())
    reports, left_out = [], 0
    with _progress() as progress:
        meter = Meter(progress, "verify", total)
        for name, num_bytes, compared in verify(hf, dist):
            meter.add(num_bytes)
            left_out += not compared
            reports.append(Report(name, num_bytes if compared else 0, peak_rss()))
    told = f" ({left_out} of the MTP block are not in the latter)" if left_out else ""
    print(f"{len(reports) - left_out} tensors of {hf} and {dist} are the same{told}: ", end="")
    return reports


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-lite convert")
    actions = parser.add_subparsers(dest="action", required=True)
    to_dist = actions.add_parser("hf-to-dist", help="HF folder to Megatron torch_dist")
    to_dist.add_argument("--hf", type=Path, required=True)
    to_dist.add_argument("--dtype", choices=list(DTYPES), default="keep")
    to_hf = actions.add_parser("dist-to-hf", help="Megatron torch_dist to an HF folder")
    to_hf.add_argument("--dist", type=Path, required=True)
    to_hf.add_argument("--hf-template", type=Path, required=True, help="gives files and names")
    for one in (to_dist, to_hf):
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--node-rank", type=int, default=0)
        one.add_argument("--num-nodes", type=int, default=1)
        one.add_argument("--head-ip", default="", help="where ranks meet; else in the folder")
        one.add_argument("--workers", type=int, default=1, help="processes of this rank")
        one.add_argument("--timeout", type=float, default=600.0, help="seconds without any news")
    compare = actions.add_parser("verify", help="compare an HF folder with a torch_dist one")
    compare.add_argument("--hf", type=Path, required=True)
    compare.add_argument("--dist", type=Path, required=True)
    return parser


def _convert(job: ToDist | ToHf, options: argparse.Namespace) -> list[Report]:
    """This rank's share; rank 0 also waits for the others and closes the folder."""
    try:
        return _do_share(job, options)
    except OSError as error:  # of this rank or of a worker of it
        raise ValueError(
            f"{error.filename or job.out}: {error.strerror or error}; what is finished stays, the "
            "same command goes on"
        ) from error


def _do_share(job: ToDist | ToHf, options: argparse.Namespace) -> list[Report]:
    rank, num_ranks = options.node_rank, options.num_nodes
    if not 0 <= rank < num_ranks or options.workers < 1:
        raise ValueError(
            f"--node-rank {rank} --num-nodes {num_ranks} --workers {options.workers}: wanted "
            "0 <= node-rank < num-nodes, and at least 1 worker"
        )
    units, largest = job.prepare()
    mine = [unit for unit in share(units, rank, num_ranks) if not intact(job.out, unit)]
    to_write = sum(unit.num_bytes for unit in units if not done(job.out, unit))
    if not to_write and (job.out / job.last).is_file():
        print(f"{job.out} is complete: nothing to do")
        return []
    print(check_resources(job.out, to_write, largest, options.workers), flush=True)
    if options.head_ip and not _have_met(job.out, num_ranks).is_file():
        try:
            _meet(options.head_ip, rank, num_ranks, options.timeout)
        except torch.distributed.DistError as error:
            raise ValueError(
                f"rank 0 of {num_ranks} does not answer, or no longer, at {options.head_ip}:{PORT} "
                f"(waited up to {options.timeout:g} s): start it, and then this one"
            ) from error
        _have_met(job.out, num_ranks).touch()
    reports = _work(job, mine, options.workers)
    if rank == 0:
        _wait_for_others(job.out, units, num_ranks, options.timeout)
        job.finish(units)
    return reports


def _have_met(out: Path, num_ranks: int) -> Path:
    """Says that all ranks were there once: one that is killed later comes back alone, to nobody who
    waits, and goes on by what is in the folder."""
    return out / PROGRESS / f"met_{num_ranks}"


def _meet(host: str, rank: int, num_ranks: int, timeout_s: float) -> None:
    """All ranks are there, before the first byte is written."""
    store = open_store(host, PORT, rank == 0, timeout_s)
    store.set(f"rank{rank}", "here")
    deadline = time.monotonic() + timeout_s
    while missing := [r for r in range(num_ranks) if not store.check([f"rank{r}"])]:
        if time.monotonic() > deadline:
            told = ", ".join(map(str, missing))
            raise ValueError(
                f"rank {told} of {num_ranks} did not come to {host}:{PORT} within {timeout_s:g} s"
            )
        time.sleep(POLL_S)
    store.set(f"seen{rank}", "all")
    while rank == 0 and not store.check([f"seen{r}" for r in range(num_ranks)]):
        if time.monotonic() > deadline:
            break  # the store is all that they need of rank 0
        time.sleep(POLL_S)


def _work(job: ToDist | ToHf, units: Sequence[Unit], workers: int) -> list[Report]:
    reports: list[Report] = []
    settled: list[Future[None]] = []
    # torch alone takes seconds to import, so workers are forked: on the first submit, when no other
    # thread runs yet
    fork = multiprocessing.get_context("fork")
    size = max(1, min(workers, len(units)))
    with (
        ThreadPoolExecutor(size) as disk,
        ProcessPoolExecutor(size, fork, _become_worker, (os.getpid(),)) as pool,
    ):
        futures = {pool.submit(job.convert, unit): unit for unit in units}

        def settle_it(future: Future[Report]) -> None:  # also after another one has failed
            if not future.cancelled() and future.exception() is None:
                settled.append(disk.submit(settle, job.out, futures[future], future.result()))

        for future in futures:
            future.add_done_callback(settle_it)
        with _progress() as progress:
            meter = Meter(progress, job.out.name, sum(unit.num_bytes for unit in units))
            try:
                for future in as_completed(futures):
                    reports.append(future.result())
                    meter.add(reports[-1].num_bytes)
            except BrokenProcessPool as error:
                raise OSError(errno.ECHILD, "a worker died (killed, or out of memory)") from error
            finally:
                pool.shutdown(cancel_futures=True)
    for one in settled:
        one.result()
    return reports


def _become_worker(parent: int) -> None:
    # it must not outlive a rank that is killed: the rank that comes back would write the same files
    die_with(parent)
    torch.set_num_threads(1)  # others do not survive a fork, and each core has its worker


def _wait_for_others(out: Path, units: Sequence[Unit], num_ranks: int, timeout_s: float) -> None:
    """Until every rank has done its share. Gives up, naming ranks, after a time without news."""
    shares = [share(units, rank, num_ranks) for rank in range(num_ranks)]
    with _progress() as progress:
        meter, news, known = None, time.monotonic(), 0
        while True:
            left = [sum(u.num_bytes for u in one if not done(out, u)) for one in shares]
            if not any(left):
                return
            if meter is None:
                meter, known = Meter(progress, "other ranks", sum(left)), sum(left)
            slowest = max(range(num_ranks), key=left.__getitem__)
            meter.add(known - sum(left), f"slowest: rank {slowest}")
            if sum(left) != known:
                news, known = time.monotonic(), sum(left)
            if time.monotonic() - news > timeout_s:
                late = ", ".join(str(rank) for rank, todo in enumerate(left) if todo)
                raise ValueError(
                    f"{out}: no news for {timeout_s:g} s of rank {late}; start it again, and then "
                    "this one: what is finished stays"
                )
            time.sleep(POLL_S)


class Meter:
    """One bar, with the GB/s since it began."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._begin, self._moved = progress, time.monotonic(), 0
        self._task = progress.add_task(name, total=total, rate="")

    def add(self, num_bytes: int, note: str = "") -> None:
        self._moved += num_bytes
        rate = self._moved / 1e9 / max(time.monotonic() - self._begin, 1e-9)
        self._progress.update(self._task, advance=num_bytes, rate=f"{rate:.2f} GB/s {note}")


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns()[:-1],
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )


def _closing(reports: Sequence[Report], seconds: float) -> None:
    """Bytes, seconds, GB/s, peak memory."""
    num_bytes = sum(report.num_bytes for report in reports)
    peak = max((report.peak_rss for report in reports), default=0)
    memory = f", peak RSS of a worker {peak / 1e9:.2f} GB" if peak else ""
    print(f"{num_bytes:,} bytes in {seconds:.1f} s, {num_bytes / 1e9 / seconds:.2f} GB/s{memory}")
