"""Rows of a data set by number, wherever they lie, without loading them all.

    train.jsonl    train.parquet[:1000]    folder-of-save_to_disk?split=train
    hf:openai/gsm8k?name=main&split=train

A path may end in rows, [a:b] or @[a:b], as a Python slice has them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tempfile
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from miles_lite.untrusted import numbered_lines, parse_object, short

Row = Mapping[str, Any]

_BATCH_ROWS = 1024  # of parquet, held at once while unpacking
_SLICE = re.compile(r"(?P<path>.+?)@?\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


class Rows(Protocol):
    digest: str  # of all that they hold

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Raises ValueError naming file and line."""
        ...

    def number(self, index: int) -> int:
        """Row number in the whole file, from 0."""
        ...

    def where(self, index: int) -> str:
        """For messages: file and line."""
        ...


def open_rows(path: str) -> Rows:
    """The rows that `path` names. Raises ValueError for what is not there or cannot be read."""
    sliced = _SLICE.fullmatch(path)
    place = sliced["path"] if sliced else path
    place, _, query = place.partition("?")
    rows = _open(place, dict(parse_qsl(query)))
    if not sliced:
        return rows
    start, stop = (int(end) if end else None for end in sliced.group("start", "stop"))
    return _Slice(rows, range(len(rows))[start:stop])


def _open(place: str, options: dict[str, str]) -> Rows:
    if place.startswith("hf:"):
        return _Dataset(place, _from_hub(place.removeprefix("hf:"), options))
    file = Path(place)
    if file.is_dir():
        return _Dataset(place, _from_folder(file, options))
    if not file.is_file():
        raise ValueError(f"no data file {file}")
    _check_options(place, options, ())
    if file.suffix == ".jsonl":
        return _JsonLines(file)
    if file.suffix == ".parquet":
        return _Parquet(file)
    raise ValueError(f"{file} is neither .jsonl nor .parquet, nor a folder saved by `datasets`")


class _Slice:
    def __init__(self, rows: Rows, chosen: range) -> None:
        self._rows, self._chosen = rows, chosen
        self.digest = f"{rows.digest}[{chosen.start}:{chosen.stop}]"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Row:
        return self._rows[self._chosen[index]]

    def number(self, index: int) -> int:
        return self._rows.number(self._chosen[index])

    def where(self, index: int) -> str:
        return self._rows.where(self._chosen[index])


class _JsonLines:
    """Keeps where each line begins, 16 bytes a row, and reads rows from the file."""

    def __init__(self, file: Path) -> None:
        self._name, self._file = file, file.open("rb")
        self._offsets, self._numbers = array("q"), array("q")
        digest, offset = hashlib.blake2b(digest_size=16), 0
        for number, (_, line) in enumerate(numbered_lines(self._file, file)):
            digest.update(line)
            if line.strip():  # a blank line, usually the last, is no row but counts as a line
                self._offsets.append(offset)
                self._numbers.append(number)
            offset += len(line)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        row = parse_object(line, self.where(index))
        if b"\\ud" in line.lower():
            _refuse_half_characters(row, self.where(index))
        return row

    def number(self, index: int) -> int:
        return self._numbers[index]

    def where(self, index: int) -> str:
        return f"{self._name}:{self._numbers[index] + 1}"


def _refuse_half_characters(row: Row, where: str) -> None:
    """JSON can spell one surrogate of a pair, which no encoding knows, nor any tokenizer."""
    for key, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: {key} = {short(value)} holds half of a surrogate pair, no character"
            ) from None


class _Parquet:
    """Rows of a copy, unpacked once into a nameless temporary file that is mapped into memory.

    Parquet itself is read by row groups, often all of a file in one: far too much for one row.
    """

    def __init__(self, file: Path) -> None:
        try:
            import pyarrow  # optional: only those with parquet data need it
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"reading {file} needs pyarrow: pip install pyarrow") from None
        self._name = file
        with tempfile.TemporaryFile(prefix="miles-lite-parquet-") as copy:
            try:
                packed = parquet.ParquetFile(file, pre_buffer=False)
                with pyarrow.ipc.new_file(copy, packed.schema_arrow) as writer:
                    for batch in packed.iter_batches(batch_size=_BATCH_ROWS):
                        writer.write_batch(batch)
            except (OSError, ValueError, pyarrow.ArrowException) as error:  # or a name is no text
                raise ValueError(f"{file} cannot be read as parquet: {error}") from error
            copy.flush()
            mapped = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
        self._table = pyarrow.ipc.open_file(mapped).read_all()
        with file.open("rb") as raw:
            self.digest = hashlib.file_digest(raw, "blake2b").hexdigest()[:32]

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Row:
        try:
            return self._table.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:  # bytes that are no text, dates of no year
            raise ValueError(f"{self.where(index)} cannot be read: {error}") from None

    def number(self, index: int) -> int:
        return index

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


class _Dataset:
    """Of Hugging Face `datasets`, which maps its files into memory."""

    def __init__(self, name: str, data: Any) -> None:
        self._name, self._data = name, data
        self.digest = data._fingerprint  # of its files and all that was done to them

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Row:
        return self._data[index]

    def number(self, index: int) -> int:
        return index

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


def _from_hub(name: str, options: dict[str, str]) -> Any:
    _check_options(f"hf:{name}", options, ("name", "split"))
    datasets = _datasets(f"hf:{name}")
    try:
        return datasets.load_dataset(name, options.get("name"), split=options.get("split", "train"))
    except Exception as error:  # whatever its network, cache and builders raise
        raise ValueError(
            f"hf:{name}: {type(error).__name__}: {error}. Without a network, save a copy with "
            "`datasets`' save_to_disk where there is one, and give its folder"
        ) from error


def _from_folder(folder: Path, options: dict[str, str]) -> Any:
    datasets = _datasets(str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever damaged files of it make it raise
        raise ValueError(f"{folder} was not saved by `datasets`' save_to_disk: {error}") from error
    if isinstance(data, datasets.Dataset):
        _check_options(str(folder), options, ())
        return data
    _check_options(str(folder), options, ("split",))
    split = options.get("split", "")
    if split not in data:
        raise ValueError(
            f"{folder} has the splits {', '.join(data)}: say which, {folder}?split=..."
        )
    return data[split]


def _check_options(place: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    if unknown := options.keys() - set(known):
        raise ValueError(
            f"{place}: no option {unknown.pop()!r} here; there is {' and '.join(known) or 'none'}"
        )


def _datasets(name: str) -> Any:
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise ValueError(f"reading {name} needs `datasets`: pip install datasets") from None
    return datasets
