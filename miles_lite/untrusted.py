"""JSON that anybody may have written, and paths in it: whatever is wrong is a ValueError that says
where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

MAX_LINE_BYTES = 64 << 20  # a longer line is refused before more of it is read
MAX_DEPTH = 100  # lists and objects within each other; Python gives up at less than a thousand


def parse_json(data: str | bytes, where: str) -> Any:
    """The value of `data`; `where` names it in messages."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{where}: not JSON ({error}): {short(data)}") from None
    brackets = (b"[", b"{") if isinstance(data, bytes) else ("[", "{")
    if sum(data.count(bracket) for bracket in brackets) > MAX_DEPTH:  # pyright: ignore
        _refuse_depth(value, where)
    return value


def parse_object(data: str | bytes, where: str) -> dict[str, Any]:
    """The same of what must be a JSON object."""
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {short(value)} is not a JSON object")
    return value


def numbered_lines(file: BinaryIO | Any, name: object) -> Iterator[tuple[str, bytes]]:
    """(NAME:NUMBER, line) of a file open for bytes, numbers from 1."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB: wanted one JSON "
                "object a line"
            )
        yield f"{name}:{number}", line


def check_inner_path(file: object, where: str) -> None:
    """Raise ValueError unless `file` names something below the folder that it is joined to."""
    text = file if isinstance(file, str) else ""
    way = PurePosixPath(text)
    if not text or str(way) != text or way.is_absolute() or ".." in way.parts or "\0" in text:
        raise ValueError(f"{where} names {short(file)}, which is no file below it")


def _refuse_depth(value: Any, where: str) -> None:
    """Deep values can be read and then not be written, or only from some places."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        lists = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [child for each in lists for child in each]
    if level:
        raise ValueError(f"{where}: more than {MAX_DEPTH} lists and objects within each other")


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value[:200] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else text[:77] + "..."
