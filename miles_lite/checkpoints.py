"""Checkpoints of a run: one folder each, seen only when complete, checked before it is trusted.

    RUN/checkpoints/step_000012/
      policy/ reference/ random/     of the trainer's ranks, see trainer/megatron/checkpoint.py
      state.json                     of the driver: position in the data, metrics
      probe.npz                      the answers of the last step and their log-probs, see resume.py
      manifest.json                  size and hash of every other file; written last
    RUN/checkpoints/latest           its name, for people and scripts

Step 12 means: after 12 steps. A folder that starts with a dot was never finished.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_lite.intact import HASH, OTHER_HASH, to_disk, tree_to_disk, writing
from miles_lite.protocols import RunError
from miles_lite.untrusted import check_inner_path, parse_object, short

logger = logging.getLogger(__name__)

WEIGHTS_ONLY = "latest_checkpointed_iteration.txt"  # what a folder of the converter has
# what a state holds at least; counts are not negative
STATE: Mapping[str, type] = {
    "config": dict, "layout": dict, "prompts": dict,
    "num_dead": int, "metrics_bytes": int, "drift": float,
}  # fmt: skip
Digests = Callable[[Path, Sequence[str]], Mapping[str, str]]  # of files, by their relative names


class CheckpointError(RunError):
    """Nothing that was saved can be loaded, or it does not compute what it did."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    step: int
    state: Mapping[str, Any]


class Checkpoints:
    """keep: so many of the newest stay; keep_every: and those of every so many steps (0: none)."""

    def __init__(self, folder: Path, keep: int, keep_every: int) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into."""
        folder = self._folder / f".{_name(step)}.part"
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, state: Mapping[str, Any], digests: Digests) -> Checkpoint:
        """All has been written: make it seen, under its name, and drop what is no longer kept."""
        with writing(self._folder):
            return self._commit(step, state, digests)

    def _commit(self, step: int, state: Mapping[str, Any], digests: Digests) -> Checkpoint:
        part, folder = self._folder / f".{_name(step)}.part", self._folder / _name(step)
        _write_json(part / "state.json", state)
        files = _files(part)
        hashes = digests(part, files)
        unread = [file for file in files if not hashes[file]]
        assert not unread, f"{part}: {unread[:3]} cannot be read back"
        sizes = {file: (part / file).stat().st_size for file in files}
        manifest = {file: {"bytes": sizes[file], "hash": hashes[file]} for file in files}
        tree_to_disk(part)
        _write_json(part / "manifest.json", {"step": step, "hash": HASH, "files": manifest})
        to_disk(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        to_disk(self._folder)
        tracker = self._folder / ".latest.part"
        tracker.write_text(folder.name + "\n")
        to_disk(tracker)
        tracker.replace(self._folder / "latest")
        self._prune(step)
        return Checkpoint(folder, step, state)

    def intact(self, digests: Digests) -> Iterator[Checkpoint]:
        """Newest first, those whose every file is as it was written. Says what it skips and why.

        Raises CheckpointError after them if there are others and none of these.
        """
        for unfinished in self._folder.glob(".*.part"):
            logger.warning("%s was never finished: removed", unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)
        folders = self._all()
        skipped: list[str] = []
        for folder in reversed(folders):
            try:
                yield read_checkpoint(folder, digests)
            except ValueError as error:
                skipped.append(f"{folder.name}: {error}")
                logger.warning("%s is skipped: %s", folder, error)
        if skipped and len(skipped) == len(folders):
            raise CheckpointError(
                f"no checkpoint in {self._folder} is intact ({'; '.join(skipped)}): put them back, "
                "or remove the folder to start from step 0, which drops what was logged"
            )

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step_*"), key=_step)

    def _prune(self, step: int) -> None:
        # one of a later step is one that was skipped on loading: it must not push out a good one
        for folder in [one for one in self._all() if _step(one) <= step][: -self._keep]:
            if not (self._keep_every and _step(folder) % self._keep_every == 0):
                # renamed first: a half-removed folder must not look like a broken checkpoint
                gone = folder.rename(folder.with_name(f".{folder.name}.part"))
                shutil.rmtree(gone, ignore_errors=True)


def read_checkpoint(folder: Path, digests: Digests) -> Checkpoint:
    """Raises ValueError that says which file is not what was written."""
    if (folder / WEIGHTS_ONLY).is_file():
        raise ValueError("it holds weights only and cannot resume the optimizer")
    files = _manifest(folder)
    for file, (size, _) in files.items():
        if (found := _size(folder / file)) != size:
            told = "is missing" if found < 0 else f"has {found:,} bytes instead of {size:,}"
            raise ValueError(f"{file} {told}")
    found = digests(folder, list(files))
    if broken := [file for file, (_, digest) in files.items() if found[file] != digest]:
        raise ValueError(f"the contents of {', '.join(sorted(broken)[:3])} have changed")
    if "state.json" not in files:
        raise ValueError("manifest.json does not name state.json")
    state = parse_object((folder / "state.json").read_bytes(), "state.json")
    for key, kind in STATE.items():
        value: Any = state.get(key)
        if not isinstance(value, kind) or (kind is int and value < 0):
            raise ValueError(f"state.json has {key} = {short(value)}")
    return Checkpoint(folder, _step(folder), state)


def _size(file: Path) -> int:
    """-1 where there is no file, or can be none of such a name."""
    try:
        return file.stat().st_size if file.is_file() else -1
    except (OSError, ValueError):
        return -1


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every file, all of them below `folder`. Raises ValueError."""
    try:
        manifest = parse_object((folder / "manifest.json").read_bytes(), "manifest.json")
        files = {
            str(file): (int(entry["bytes"]), str(entry["hash"]))
            for file, entry in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"manifest.json cannot be read ({error!r})") from None
    if manifest.get("hash") != HASH:
        raise ValueError(OTHER_HASH)
    if manifest.get("step") != _step(folder):
        raise ValueError(f"manifest.json is of step {short(manifest.get('step'))}")
    for file in files:
        check_inner_path(file, "manifest.json")
    return files


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="ascii")
    to_disk(path)
