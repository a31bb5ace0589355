"""Reads the file of an offline W&B run: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32_768, 7  # bytes; of the file, and again of every record: checksum, length, kind
FULL, LAST = 1, 4  # kinds that end a record


def records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += HEADER + length
        whole += data[at - length : at]
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, call by call; keys of nested values are joined by slashes."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in line.item}
        for record in records(file)
        if record.WhichOneof("record_type") == "history"
        for line in [record.history]
    ]


def axes(file: Path) -> dict[str, str]:
    """The x-axis of each pattern of metrics that has one."""
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    return {m.glob_name: m.step_metric for m in metrics if m.glob_name}


def config(file: Path) -> dict[str, Any]:
    runs = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"]
    return {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
