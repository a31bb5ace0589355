"""A data file that anybody wrote: rows, or one sentence that names file and line."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from miles_lite.config import SourceConfig
from miles_lite.data.source import RenderSettings, open_source
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.types import Prompt

OK = b'{"prompt":"1+1","label":"2"}\n'
MAX_LEN = 1200  # of a message, the path in it included


@pytest.fixture(scope="module")
def render(tokenizer: ChatTokenizer) -> RenderSettings:
    return RenderSettings(tokenizer, {}, 64, 0.9, ("",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def read(path: Path, data: bytes, render: RenderSettings) -> list[Prompt] | str:
    """The prompts, or the refusal."""
    path.write_bytes(data)
    try:
        return open_source("set", SourceConfig(path=str(path)), render).all()
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path)) and len(message) < MAX_LEN, message
        return message


def with_label(value: bytes) -> bytes:
    return b'{"prompt":"a","label":' + value + b"}\n"


def with_metadata(value: bytes) -> bytes:
    return b'{"prompt":"a","label":1,"metadata":' + value + b"}\n"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", ": no rows|holds no rows"),
        (b"\n \n\n", "holds no rows"),
        (OK + b'{"prompt":\n', ":2: not JSON"),
        (OK + OK[:-5], ":2: not JSON"),
        (b"[1]\n", ":1: .* is not a JSON object"),
        (b"3\n", ":1: 3 is not a JSON object"),
        (b"null\n", ":1: None is not"),
        (OK.decode().encode("utf-16"), ":1: not JSON"),
        ('{"prompt":"é","label":"2"}\n'.encode("latin-1"), ":1: not JSON .*utf-8"),
        (OK.replace(b"\n", b"\r") * 2, ":1: not JSON .*Extra data"),
        (b"\0" * 100, ":1: not JSON"),
        (b'{"prompt":"a\0b","label":"2"}\n', ":1: not JSON .*control character"),
        (b"[" * 100_000 + b"\n", ":1: not JSON .*recursion"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n", ":1: not JSON .*recursion|:1: more than"),
        (b'{"prompt":' + b"[" * 900 + b"]" * 900 + b',"label":1}\n', ":1: more than 100 lists"),
        (with_metadata(b"[" * 500 + b"]" * 500), ":1: more than 100 lists"),
        (with_metadata(b'"' + b"[" * 100_000 + b'"'), ":1: metadata: not JSON .*recursion"),
        (with_metadata(b'"{\\"a\\":' + b"9" * 5000 + b'}"'), ":1: metadata: not JSON .*4300"),
        (with_metadata(b'{"a":"\\ud800"}'), ":1: metadata = .* half of a surrogate pair"),
        (with_label(b"9" * 5000), ":1: not JSON .*4300"),
        (with_label(b"1e999"), ":1: label = inf is neither"),
        (with_label(b"NaN"), ":1: label = nan is neither"),
        (with_label(b"-Infinity"), ":1: label = -inf is neither"),
        (with_label(b'{"a":1}'), ":1: label = .* is neither"),
        (with_label(b'"\\udfff"'), ":1: label = .* half of a surrogate pair"),
        (b'{"\\ud800":"x","prompt":"a","label":1}\n', None),  # a key that nobody asks for
        (b'{"\\u001b[31m":1,"label":1}\n', r":1: no key 'prompt'; the row has '\\x1b\[31m'"),
        (b'{"prompt":{"\\u001b[31m":1},"label":1}\n', r":1: prompt = .*\\x1b\[31m.* is neither"),
        (b'{"prompt":[{"role":"\\u001b[2J","content":"a"}],"label":1}\n', None),
        (
            b'{"prompt":"' + b"a" * 10_000_000 + b'","label":1}\n',
            "first is .*:1 with [0-9]+ tokens or more",
        ),
        (b'{"prompt":"' + b"a" * (65 << 20), ":1: a line of more than 64 MiB"),
        (OK + OK + b'{"prompt":"1+1","prompt":"2+2","label":"2"}\n', None),  # JSON: the last counts
        (OK.replace(b"\n", b"\r\n") * 2, None),
        (b"\xef\xbb\xbf" + OK, None),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_lines(folder: Path, render: RenderSettings, data: bytes, told: str | None) -> None:
    found = read(folder / "a.jsonl", data, render)
    if told is None:
        assert isinstance(found, list) and found
    else:
        assert isinstance(found, str) and re.search(told, found), found
        assert re.fullmatch(r"[\n\x20-\x7eé]*", found), found  # nothing that steers a terminal


# ------------------------------------------------------------------ anything

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": JSON, "content": JSON}) | JSON, min_size=1, max_size=2
)
ROWS = st.fixed_dictionaries(
    {},
    optional={"prompt": JSON | MESSAGES | st.just("1+1"), "label": JSON | st.just("2")}
    | {"metadata": JSON, "tools": JSON},
)


@settings(max_examples=200, derandomize=True)
@given(rows=st.lists(ROWS | JSON, min_size=1, max_size=3))
def test_any_json(folder: Path, render: RenderSettings, rows: list[Any]) -> None:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    found = read(folder / "any.jsonl", data, render)
    if isinstance(found, str):
        assert re.match(rf"{folder}/any\.jsonl(:\d+: |: | holds)", found), found


@settings(max_examples=200, derandomize=True)
@given(
    st.binary(max_size=200)
    | st.tuples(st.integers(0, len(OK) - 1), st.binary(max_size=4)).map(
        lambda cut: OK[: cut[0]] + cut[1] + OK[cut[0] + len(cut[1]) :] + OK
    )
)
def test_any_bytes(folder: Path, render: RenderSettings, data: bytes) -> None:
    read(folder / "bytes.jsonl", data, render)


@pytest.fixture(scope="module")
def packed(folder: Path) -> bytes:
    path = folder / "good.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "label": ["1", "2"]}), path)
    return path.read_bytes()


@settings(max_examples=150, derandomize=True)
@example(changes=[(0.25, 128)], kept=1.0)  # the name of a column is no text
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    ),
    kept=st.floats(0.05, 1) | st.just(1.0),
)
def test_any_byte_of_parquet(
    folder: Path,
    render: RenderSettings,
    packed: bytes,
    changes: list[tuple[float, int]],
    kept: float,
) -> None:
    data = bytearray(packed)
    for where, value in changes:
        data[int(where * len(data))] = value
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(folder / "any.parquet", bytes(data[: int(kept * len(data))]), render)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
