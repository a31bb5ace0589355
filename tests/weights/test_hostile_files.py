"""Model files that anybody wrote, byte by byte and value by value: read as they should be, or
refused by the file's name. Never another error, and no file outside of the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miles_lite.compose import CONFIGS
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.weights.hf import HfCheckpoint
from miles_lite.weights.hf_files import INDEX, SINGLE, HfFiles
from miles_lite.weights.torch_dist import DistCheckpoint
from tests.weights.test_convert import to_dist

TINY = CONFIGS / "model" / "tiny"
MAX_LEN = 1500
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.zeros(0, 3, dtype=torch.float16),
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F32", "BF16", "I64", "", "a", "\0", "\ud800", "MEM*EM*E", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape"]), inner, max_size=2)
    ),
    max_leaves=6,
)
FUZZ = settings(max_examples=150, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    save_file(TENSORS, folder / SINGLE)
    return folder


@pytest.fixture(scope="module")
def sound(folder: Path) -> bytes:
    return (folder / SINGLE).read_bytes()


def refusal(read: Callable[[], Any], where: Path) -> str:
    """ "" if it was read."""
    try:
        read()
    except ValueError as error:
        message = str(error)
        assert str(where) in message and len(message) < MAX_LEN, message
        return message
    return ""


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit: NaN, too."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """By both readers, which agree."""
    first, second, found = HfCheckpoint(folder), HfFiles(folder), {}
    for name in first.names():
        shape = first.shape(name)
        with second.mapped(name) as tensor:
            found[name] = tensor.clone()
        if shape:  # a slice needs a dimension
            assert same(first.read(name, 0, 0, shape[0]), found[name])
    return found


def check(folder: Path, data: bytes) -> None:
    """Refused, or what safetensors itself reads."""
    path = folder / SINGLE
    path.write_bytes(data)
    if not refusal(lambda: read_all(folder), path):
        wanted, found = load_file(path), read_all(folder)
        assert set(found) == set(wanted)
        for name, tensor in found.items():
            assert same(tensor, wanted[name])


def replaced(sound: bytes, header: Any) -> bytes:
    length = int.from_bytes(sound[:8], "little")
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + sound[8 + length :]


@FUZZ
@given(at=st.integers(0, 400), new=st.binary(min_size=1, max_size=3), cut=st.integers(0, 500))
def test_any_byte_of_safetensors(folder: Path, sound: bytes, at: int, new: bytes, cut: int) -> None:
    at %= len(sound)
    check(folder, sound[:at] + new + sound[at + len(new) :])
    check(folder, sound[: cut % len(sound)])


@FUZZ
@given(
    name=st.sampled_from(["a", "b", "c", "d"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", ""]),
    value=JSON | st.lists(st.integers(-2, 40), max_size=3),
)
def test_any_value_of_its_header(
    folder: Path, sound: bytes, name: str, key: str, value: Any
) -> None:
    length = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + length])
    entry = header.get(name, header["a"])
    header[name] = {**entry, key: value} if key else value
    check(folder, replaced(sound, header))


def test_a_sound_file_is_read(folder: Path, sound: bytes) -> None:
    """Else all of the above could be refused."""
    (folder / SINGLE).write_bytes(sound)
    found = read_all(folder)
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"a": None},
        {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}},
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 2**63]}},
        {"a": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": {"0": 6}, "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [True] * 6, "data_offsets": [0, 24]}},
        {"../../a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}},
        {"-" * 16_000: {"dtype": "I64", "shape": [6], "data_offsets": [0, 24]}},
        {"a": {"dtype": "-" * 16_000, "shape": [6], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [1] * 16_000, "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [6.0] * 16_000, "data_offsets": [0, 24]}},
    ],
)
def test_headers(folder: Path, sound: bytes, header: Any) -> None:
    (folder / SINGLE).write_bytes(replaced(sound, header))
    assert refusal(lambda: read_all(folder), folder / SINGLE)


@pytest.fixture(scope="module")
def indexed(folder: Path) -> Path:
    place = folder / "indexed"
    place.mkdir()
    save_file(TENSORS, place / "model-1.safetensors")
    save_file(TENSORS, folder / "outside.safetensors")
    return place


NAMES = [
    "../outside.safetensors", "./model-1.safetensors", "/etc/passwd", "", ".", "..", "a\0b",
    "\ud800", "x" * 5000, "model-2.safetensors", "model-1.safetensors/", 3, None, ["a"], {},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
def test_an_index_reaches_nothing_outside(indexed: Path, name: Any) -> None:
    files = dict.fromkeys(TENSORS, "model-1.safetensors") | {"a": name}
    (indexed / INDEX).write_text(json.dumps({"weight_map": files}))
    assert refusal(lambda: HfCheckpoint(indexed), indexed / INDEX)
    assert refusal(lambda: HfFiles(indexed), indexed / INDEX)


def test_a_long_name_in_an_index(indexed: Path) -> None:
    (indexed / INDEX).write_text(json.dumps({"weight_map": {"-" * 16_000: "model-1.safetensors"}}))
    assert refusal(lambda: HfFiles(indexed), indexed / INDEX)


@FUZZ
@given(value=JSON | st.dictionaries(st.sampled_from("abcd"), JSON | st.just("model-1.safetensors")))
def test_any_value_of_an_index(indexed: Path, value: Any) -> None:
    (indexed / INDEX).write_text(json.dumps({"weight_map": value}))
    refusal(lambda: read_all(indexed), indexed)


# ------------------------------------------------------------------ config.json, .metadata

CONFIG = json.loads((TINY / "config.json").read_text())


@settings(FUZZ, max_examples=400)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, min_size=1, max_size=2))
def test_any_value_of_a_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    refusal(lambda: NemotronH.from_folder(folder), path)


@pytest.fixture(scope="module")
def dist(folder: Path) -> Path:
    return to_dist(TINY, folder / "dist") / "release"


@FUZZ
@given(at=st.floats(0, 1, exclude_max=True), new=st.binary(min_size=1, max_size=9))
def test_any_byte_of_torch_dist_metadata(folder: Path, dist: Path, at: float, new: bytes) -> None:
    sound = (dist / ".metadata").read_bytes()
    place = folder / "other"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    start = int(at * len(sound))
    (place / ".metadata").write_bytes(sound[:start] + new + sound[start + len(new) :])
    refusal(lambda: DistCheckpoint(place), place / ".metadata")
