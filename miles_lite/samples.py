"""`miles-lite samples RUN`: what the model wrote, on a terminal that it cannot steer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles_lite.log import printable
from miles_lite.records import SampleRecord, read_samples


def run(words: Sequence[str]) -> None:
    options = _parser().parse_args(words)
    folder, step = split_run(options.run)
    file = sample_file(folder, step if options.step is None else options.step, options.set)
    found = [
        record
        for record in read_samples(file)
        if wanted(record, options.reward, options.invalid, options.uid)
    ]
    console = Console()
    if options.full:
        for record in found[: options.num]:
            console.print(_whole(record))
    else:
        console.print(_table(found[: options.num]))
    console.print(f"{min(options.num, len(found))} of {len(found)} samples of {file}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-lite samples")
    parser.add_argument("run", help="folder of a run, RUN or RUN@STEP; else its last step")
    parser.add_argument("--step", type=int, help="the same as RUN@STEP")
    parser.add_argument("--set", default="", help="of an evaluation set instead of training")
    parser.add_argument("--reward", default="", help="X, X.. or X..Y")
    parser.add_argument("--invalid", action="store_true", help="without a verdict only")
    parser.add_argument("--uid", default="", help="prompts whose uid has this in it")
    parser.add_argument("--num", type=int, default=20, help="samples shown")
    parser.add_argument("--full", action="store_true", help="whole texts instead of a table")
    return parser


def split_run(run: str) -> tuple[Path, int | None]:
    """RUN or RUN@STEP."""
    folder, _, step = run.rpartition("@")
    if Path(run).is_dir() or not folder:
        return Path(run), None
    if not step.isdecimal():
        raise ValueError(f"{run}: {step!r} is not a step; write RUN@STEP, as in {folder}@12")
    return Path(folder), int(step)


def sample_file(folder: Path, step: int | None, eval_set: str) -> Path:
    """Of that step, or of the last one there is. Raises ValueError that says what there is."""
    place = folder / "eval" / eval_set if eval_set else folder / "samples"
    files = sorted(place.glob("step_*.jsonl.gz"))
    if not files:
        sets = ", ".join(sorted(path.name for path in (folder / "eval").glob("*"))) or "none"
        raise ValueError(f"{place} has no samples; evaluation sets of this run (--set): {sets}")
    if step is None:
        return files[-1]
    found = place / f"step_{step:06d}.jsonl.gz"
    if found not in files:
        first, last = (int(files[i].name[5:11]) for i in (0, -1))
        raise ValueError(f"{place} has no step {step}; there are {len(files)}, {first} to {last}")
    return found


def wanted(record: SampleRecord, reward: str, invalid: bool, uid: str) -> bool:
    if invalid and not record.invalid:
        return False
    return uid in record.prompt_uid and (not reward or _is_within(record.reward, reward))


def _is_within(value: float, bounds: str) -> bool:
    low, dots, high = bounds.partition("..")
    try:
        if not dots:
            return abs(value - float(low)) < 1e-9
        return float(low or "-inf") <= value <= float(high or "inf")
    except ValueError:
        raise ValueError(f"--reward {bounds}: wanted X, X.., ..Y or X..Y") from None


def _table(records: Sequence[SampleRecord]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    for title, width in (("prompt", 14), ("reward", 8), ("finish", 6), ("tokens", 6), ("label", 8)):
        table.add_column(title, min_width=width, max_width=24, no_wrap=True, overflow="ellipsis")
    table.add_column("response", no_wrap=True, overflow="ellipsis", ratio=1)
    for record in records:
        table.add_row(
            Text(printable(record.prompt_uid)),
            Text(printable(record.invalid) if record.invalid else f"{record.reward:g}"),
            Text(printable(record.finish)),
            str(len(record.tokens)),
            Text(printable(record.label)),
            Text(printable(record.response)),
        )
    return table


def _whole(record: SampleRecord) -> Text:
    def lines() -> Iterator[str]:
        verdict = f"no verdict: {record.invalid}" if record.invalid else f"reward {record.reward:g}"
        yield f"=== {record.prompt_uid} at step {record.step}: {verdict}, {record.finish}, "
        yield f"{len(record.tokens)} tokens, label {record.label}\n"
        yield f"{record.prompt}{record.response}\n"

    return Text(printable("".join(lines()), keep="\n\t"))
