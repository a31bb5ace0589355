"""Rows by number: what a path names, what each row holds, and where an error says it is."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from miles_lite.data.rows import open_rows

TABLE = [{"prompt": f"question {i} \u2028 \u00e4", "label": i} for i in range(25)]


def jsonl(folder: Path) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TABLE))
    return str(path)


def many_row_groups(folder: Path) -> str:
    path = folder / "groups.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(TABLE), path, row_group_size=7)
    return str(path)


def saved_dataset(folder: Path) -> str:
    path = folder / "saved"
    datasets.Dataset.from_list(TABLE).save_to_disk(path)
    return str(path)


def saved_splits(folder: Path) -> str:
    path = folder / "splits"
    whole, other = datasets.Dataset.from_list(TABLE), datasets.Dataset.from_list(TABLE[:1])
    datasets.DatasetDict({"test": other, "train": whole}).save_to_disk(path)
    return f"{path}?split=train"


KINDS = [jsonl, many_row_groups, saved_dataset, saved_splits]


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_holds_the_same_rows(tmp_path: Path, write: Callable[[Path], str]) -> None:
    rows = open_rows(write(tmp_path))
    assert len(rows) == len(TABLE)
    assert [rows[i] for i in reversed(range(len(rows)))] == TABLE[::-1]
    assert [rows.number(i) for i in (0, 24)] == [0, 24]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("at", ["", "@"])
@pytest.mark.parametrize(
    "ends", ["1:3", ":2", "3:", ":", "-2:", ":-20", "5:2", "30:", "-100:3", "10:1000"]
)
def test_a_slice_is_that_of_a_list(
    tmp_path: Path, write: Callable[[Path], str], at: str, ends: str
) -> None:
    wanted = TABLE[slice(*(int(end) if end else None for end in ends.split(":")))]
    rows = open_rows(f"{write(tmp_path)}{at}[{ends}]")
    assert [rows[i] for i in range(len(rows))] == wanted
    assert [rows.number(i) for i in range(len(rows))] == [row["label"] for row in wanted]


@pytest.mark.parametrize("write", KINDS)
def test_the_digest_tells_contents_and_slices_apart(
    tmp_path: Path, write: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    for folder in (first, again, other):
        folder.mkdir()
    path = write(first)
    digest = open_rows(path).digest
    assert open_rows(write(again)).digest == digest
    assert open_rows(path + "[1:]").digest not in (digest, open_rows(path + "[:1]").digest)
    monkeypatch.setitem(TABLE[24], "label", 99)
    assert open_rows(write(other)).digest != digest


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt": ', r"a\.jsonl:3: not JSON \(.*\): b'\{\"prompt\": "),
        (b"[1, 2]", r"a\.jsonl:3: \[1, 2\] is not a JSON object"),
        (b'"' + b"x" * 500, r"a\.jsonl:3: not JSON .{0,160}$"),
        (b'{"prompt": "\xe4"}', r"a\.jsonl:3: not JSON .*utf-8"),
        (b'{"a": 1}{"b": 2}', r"a\.jsonl:3: not JSON .*Extra data"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}')
    rows = open_rows(str(path))
    assert len(rows) == 3  # a blank line is no row
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
    with pytest.raises(ValueError, match=complaint):
        rows[1]
    assert (rows.where(2), rows.number(2)) == (f"{path}:4", 3)  # but counts as a line


def test_where_survives_a_slice(tmp_path: Path) -> None:
    rows = open_rows(jsonl(tmp_path) + "[10:]")
    assert rows.where(0).endswith("a.jsonl:11")
    assert open_rows(many_row_groups(tmp_path) + "[-1:]").where(0).endswith("groups.parquet row 24")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("none.jsonl", r"no data file .*none\.jsonl"),
        ("a.csv", r"a\.csv is neither \.jsonl nor \.parquet"),
        ("junk.parquet", r"junk\.parquet cannot be read as parquet"),
        ("folder", r"folder was not saved by `datasets`' save_to_disk"),
        ("splits", r"splits has the splits test, train: say which, .*splits\?split="),
        ("splits?split=valid", "has the splits test, train"),
        ("splits?subset=a", "no option 'subset' here; there is split"),
        ("splits/train?split=train", "no option 'split' here; there is none"),
        ("a.jsonl?split=train", "no option 'split' here; there is none"),
        ("hf:owner/set?config=main", "no option 'config' here; there is name and split"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "a.csv").write_text("prompt,label\n")
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "junk.parquet").write_bytes(b"no parquet")
    (tmp_path / "folder").mkdir()
    saved_splits(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        open_rows(name if name.startswith("hf:") else str(tmp_path / name))


def test_the_hub_without_a_network_shows_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf:nobody/nothing: .*save_to_disk") as caught:
        open_rows("hf:nobody/nothing?name=main&split=test[:10]")
    assert caught.value.__cause__ is not None


def test_what_the_hub_would_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own loader, from a folder laid out as a repository of the hub is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    for config, rows in (("main", TABLE), ("socratic", TABLE[:3])):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            lines = rows if split == "train" else rows[:2]
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (folder / config / f"{split}.jsonl").write_text(text)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - {{split: {s}, path: {config}/{s}.jsonl}}\n" for s in ("train", "test"))
            for config in ("main", "socratic")
        )
        + "---\n"
    )
    rows = open_rows(f"hf:{folder}?name=main")
    assert [rows[i] for i in range(len(rows))] == TABLE
    assert len(open_rows(f"hf:{folder}?name=main&split=test")) == 2
    assert open_rows(f"hf:{folder}?name=socratic[1:]")[0] == TABLE[1]
    with pytest.raises(ValueError, match="socratic.*save_to_disk"):
        open_rows(f"hf:{folder}?name=other")


@pytest.mark.parametrize(
    ("module", "path", "way_out"),
    [
        ("pyarrow", "a.parquet", "needs pyarrow: pip install pyarrow"),
        ("datasets", "folder", "needs `datasets`: pip install datasets"),
    ],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str, way_out: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=way_out):
        open_rows(str(tmp_path / path))


def test_a_large_file_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "x" * 1000, "label": 1}) + "\n"
    path.write_text(line * 30_000)
    tracemalloc.start()
    rows = open_rows(str(path))
    read: list[Any] = [rows[i]["label"] for i in range(0, len(rows), 100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 30_000 and set(read) == {1}
    assert peak < path.stat().st_size / 20
