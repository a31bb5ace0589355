"""A checkpoint is seen complete or not at all, and trusted only as it was written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_lite.checkpoints import STATE, CheckpointError, Checkpoints
from miles_lite.intact import file_digest
from miles_lite.resume import Probe, read_probe
from miles_lite.weights.conversion import read_manifest


def digests(folder: Path, files: Sequence[str]) -> Mapping[str, str]:
    return {file: file_digest(folder / file) for file in files}


def state(step: int) -> dict[str, Any]:
    known = {"config": {}, "layout": {}, "num_dead": 0, "metrics_bytes": 0, "drift": float("inf")}
    return known | {"prompts": {"cursor": step}}


def write(checkpoints: Checkpoints, step: int) -> Path:
    folder = checkpoints.begin(step)
    (folder / "policy").mkdir()
    (folder / "policy/__0_0.distcp").write_bytes(bytes(range(256)) * step)
    (folder / "random").mkdir()
    (folder / "random/rank_00000.pt").write_bytes(b"state")
    return checkpoints.commit(step, state(step), digests).folder


def steps(checkpoints: Checkpoints) -> list[int]:
    return [found.step for found in checkpoints.intact(digests)]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3, keep_every=0)


def test_the_newest_comes_first_with_its_state(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write(checkpoints, step)
    assert steps(checkpoints) == [10, 4, 2]
    first = next(checkpoints.intact(digests))
    assert first.state == state(10)
    assert (first.folder / "random/rank_00000.pt").read_bytes() == b"state"
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000004\n"  # written last


def test_nothing_there(checkpoints: Checkpoints) -> None:
    assert steps(checkpoints) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


FILES = ["policy/__0_0.distcp", "random/rank_00000.pt", "state.json", "manifest.json"]
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "the contents of .* have changed|manifest.json cannot be read"),
    "truncated": (
        lambda file: os.truncate(file, file.stat().st_size // 2),
        r"has [\d,]+ bytes instead of [\d,]+|manifest.json cannot be read",
    ),
    "missing": (Path.unlink, "is missing|manifest.json cannot be read"),
    "longer": (
        lambda file: file.write_bytes(file.read_bytes() + b"\n x"),
        r"bytes instead of|manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_skipped_and_named(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    write(checkpoints, 1)
    folder = write(checkpoints, 2)
    break_it, reason = DAMAGES[damage]
    if (file, damage) == ("manifest.json", "flipped"):
        (folder / file).write_text((folder / file).read_text().replace("policy", "Policy"))
        reason = "Policy/__0_0.distcp is missing"
    else:
        break_it(folder / file)
    with caplog.at_level(logging.WARNING):
        assert steps(checkpoints) == [1]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder} is skipped: ")
    assert re.search(reason, record.getMessage())


def test_one_of_other_hashes_is_skipped_and_says_so(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(checkpoints, 2) / "manifest.json"
    write(checkpoints, 1)
    manifest = json.loads(path.read_text())
    del manifest["hash"]  # as the first version wrote it, with BLAKE2
    path.write_text(json.dumps(manifest))
    assert steps(checkpoints) == [1]
    assert "its hashes are not xxh3_128: another version wrote it" in caplog.text


def test_an_unfinished_one_is_never_seen_and_removed(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(checkpoints, 1)
    folder = checkpoints.begin(2)
    (folder / "half").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert steps(checkpoints) == [1]
    assert "never finished" in caplog.text
    assert not folder.exists()


def test_the_same_step_may_be_saved_again(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1)
    write(checkpoints, 1)
    assert steps(checkpoints) == [1]


def test_the_last_k_and_every_nth_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=10)
    for step in range(5, 45, 5):
        write(checkpoints, step)
    assert steps(checkpoints) == [40, 35, 30, 20, 10]


def test_a_damaged_one_of_a_later_step_pushes_no_good_one_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=0)
    for step in (6, 9, 12):
        flip(write(checkpoints, step) / "policy/__0_0.distcp")
    write(checkpoints, 4)  # the run goes on from an older one, and is asked to save early
    write(checkpoints, 7)
    assert steps(checkpoints) == [7, 4]


def test_where_none_is_intact_nothing_is_started_anew(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for step in (1, 2):
        flip(write(checkpoints, step) / "state.json")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact \(step_000002: the c"
    ):
        steps(checkpoints)


def test_weights_only_says_so(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step_000003"
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    with pytest.raises(CheckpointError, match="holds weights only and cannot resume the optimizer"):
        steps(checkpoints)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_checkpoints import write
from miles_lite.checkpoints import Checkpoints
checkpoints = Checkpoints(Path({folder!r}), keep=2, keep_every=0)
for step in range(1, 10_000):
    write(checkpoints, step)
    print(step, flush=True)
"""


def test_killed_at_any_moment_there_is_always_an_intact_one(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    for attempt in range(8):
        code = KILLED.format(root=root, folder=str(tmp_path / "checkpoints"))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        written = int(process.stdout.readline())
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        written = max([written, *map(int, process.stdout.read().split())])
        process.wait()
        found = steps(Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=0))
        assert found and found[0] >= written  # the one being announced may be there already


def test_the_manifest_names_every_file_with_its_size(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = write(checkpoints, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    sizes = {file: entry["bytes"] for file, entry in manifest["files"].items()}
    assert sizes == {
        "policy/__0_0.distcp": 768,
        "random/rank_00000.pt": 5,
        "state.json": len(json.dumps(state(3))) + 1,
    }


def forge(folder: Path, file: str, data: bytes) -> None:
    """Put `data` there, and its size and hash into the manifest."""
    (folder / file).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": len(data), "hash": file_digest(folder / file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"config": []}, "state.json has config = []"),
        ({"layout": None}, "state.json has layout = None"),
        ({"prompts": "all"}, "state.json has prompts = 'all'"),
        ({"num_dead": -1}, "state.json has num_dead = -1"),
        ({"metrics_bytes": 1.5}, "state.json has metrics_bytes = 1.5"),
        ({"drift": "none"}, "state.json has drift = 'none'"),
        (None, "state.json: None is not a JSON object"),
    ],
)
def test_a_state_that_nobody_saved_is_skipped_though_its_hash_is_right(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, values: Any, reason: str
) -> None:
    write(checkpoints, 1)
    folder = write(checkpoints, 2)
    forge(folder, "state.json", json.dumps(values and state(2) | values).encode())
    assert steps(checkpoints) == [1]
    assert reason in caplog.text


@pytest.mark.parametrize(
    "name",
    ["../../secret", "/etc/passwd", "policy/../../../secret", "./state.json", "", "..", "a\0b"],
)
def test_a_manifest_reaches_nothing_outside(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Not even to hash it: of a device or a pipe that would take for ever."""
    (tmp_path / "secret").write_bytes(b"s")
    write(checkpoints, 1)
    path = write(checkpoints, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "hash": file_digest(tmp_path / "secret")}
    path.write_text(json.dumps(manifest))
    assert steps(checkpoints) == [1]
    assert f"manifest.json names {name!r}, which is no file below it" in caplog.text
    converted = tmp_path / "converted"
    converted.mkdir()
    told = {"tensors": {}, "files": {name: ""}, "hash": manifest["hash"]}
    (converted / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"manifest\.json names .* no file below it"):
        read_manifest(converted)


@pytest.mark.parametrize("step", [3, -2, 10**30, True, "2", None])
def test_a_manifest_of_another_step_is_skipped(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, step: Any
) -> None:
    write(checkpoints, 1)
    path = write(checkpoints, 2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step}))
    assert steps(checkpoints) == [1]
    assert f"manifest.json is of step {step!r}" in caplog.text


PROBE = Probe(*map(np.array, ([1, 2, 3, 4, 5], [2, 3], [1, 1], [-0.5, -0.25, -0.125])))


def save_probe(path: Path, **changes: Any) -> None:
    np.savez(path, **(dataclasses.asdict(PROBE) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lengths": np.array([2, 4])}, "do not fit each other"),
        ({"lengths": np.array([2, -3])}, "lengths that are none"),
        ({"lengths": np.array([2])}, "1 lengths of 2 answers"),
        ({"lengths": np.array([2.0, 3.0])}, "arrays of other types"),
        ({"prompt_lengths": np.array([1, 4])}, "lengths that are none"),
        ({"scores": np.array([0, 1, 2])}, "arrays of other types"),
        ({"scores": np.zeros((3, 1))}, "arrays of other shapes"),
        ({"scores": np.zeros(4)}, "do not fit each other"),
        ({"tokens": np.array([1, 2, 3, 4, -5])}, "token ids below 0"),
        ({"more": np.array([1])}, "TypeError"),
        ({"tokens": np.array([Path()] * 5)}, "ValueError: Object arrays cannot be loaded"),
    ],
)
def test_a_probe_that_nobody_saved_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "probe.npz"
    save_probe(path)
    assert read_probe(path).scores.tolist() == PROBE.scores.tolist()
    save_probe(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_probe(path)
    assert reason in str(caught.value)
    assert f"remove {tmp_path} to go on from an older checkpoint" in str(caught.value)


def test_a_name_that_no_file_can_have_is_skipped(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    write(checkpoints, 1)
    path = write(checkpoints, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("x" * 5000, "\ud800"):
        path.write_text(json.dumps(manifest | {"files": {name: {"bytes": 1, "hash": ""}}}))
        assert steps(checkpoints) == [1]
        assert name[:20] in caplog.text and " is missing" in caplog.text


# ------------------------------------------------------------------ anything

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoints, dict[Path, bytes]]:
    """And what is in the small files of the second."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("two"), keep=3, keep_every=0)
    write(checkpoints, 1)
    folder = write(checkpoints, 2)
    files = [folder / name for name in ("state.json", "manifest.json")]
    return checkpoints, {file: file.read_bytes() for file in files}


@settings(max_examples=150, derandomize=True)
@given(
    file=st.sampled_from(["state.json", "manifest.json"]),
    key=st.sampled_from([*STATE, "step", "hash", "files", "state.json"]),
    value=VALUES,
    cut=st.none() | st.integers(1, 300),
)
def test_any_value_of_a_checkpoint_is_told_or_skipped(
    two: tuple[Checkpoints, dict[Path, bytes]], file: str, key: str, value: Any, cut: int | None
) -> None:
    checkpoints, sound = two
    for path, data in sound.items():
        path.write_bytes(data)
    folder = next(iter(sound)).parent
    changed = json.loads((folder / file).read_text())
    (changed.get("files", changed) if key == "state.json" else changed)[key] = value
    text = json.dumps(changed)[:cut].encode()
    if file == "state.json":
        forge(folder, file, text)
    else:
        (folder / file).write_bytes(text)
    assert steps(checkpoints) in ([1], [2, 1])


@settings(max_examples=200, derandomize=True)
@given(at=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=4), cut=st.booleans())
def test_any_byte_of_a_probe_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: float, new: bytes, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "probe.npz"
    save_probe(path)
    sound = path.read_bytes()
    start = int(at * len(sound))
    path.write_bytes(sound[:start] + new + (b"" if cut else sound[start + len(new) :]))
    with contextlib.suppress(CheckpointError):
        assert not read_probe(path).fault
