"""What a run folder holds, for tools and reports: it may be damaged, be still written, or come from
somebody else."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from miles_lite.protocols import Metrics
from miles_lite.untrusted import numbered_lines, parse_object, short


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One line of a samples file."""

    step: int
    prompt_uid: str  # source and row number in its file
    prompt: str  # rendered chat template
    label: str
    response: str  # special tokens kept
    tokens: Sequence[int]  # [T] of the response
    logprobs: Sequence[float]  # [T] of the engine
    trainer_logprobs: Sequence[float]  # [T], or empty if the trainer did not see this sample
    reward: float
    invalid: str  # why there is no verdict; "" when there is one
    version: int  # of the weights that drew it
    finish: str  # a Finish
    # of the sample, before anything that needs the trainer's log-probs; NaN: it does not count
    advantage: float = math.nan
    entropies: Sequence[float] = ()  # [T] of the trainer's distributions, where it has log-probs


TOKEN_FLOATS = ("logprobs", "trainer_logprobs", "entropies")
_KINDS = {"int": int, "str": str, "float": (int, float), "Sequence[int]": int}
_KINDS["Sequence[float]"] = _KINDS["float"]


def read_metrics(folder: Path) -> dict[int, Metrics]:
    """All metrics of a run by step, in order. Where a step was logged more than once (evaluations,
    a resumed run), each metric has its latest value. A run may still be writing. Raises ValueError
    naming file and line."""
    steps: dict[int, dict[str, float]] = {}
    path = folder / "metrics.jsonl"
    with path.open("rb") as file:
        for where, line in numbered_lines(file, path):
            if not line.endswith(b"\n"):  # being written just now
                break
            record = parse_object(line, where)
            try:
                values = record | record.pop("nonfinite", {})
                step = int(values.pop("step"))
                steps.setdefault(step, {}).update({n: float(v) for n, v in values.items()})
            except (LookupError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{where}: no metrics ({error!r}): {short(line)}") from None
    return dict(sorted(steps.items()))


def read_samples(path: Path) -> Iterator[SampleRecord]:
    """The samples of one file, one at a time. Raises ValueError naming file and line."""
    with gzip.open(path, "rb") as file:
        try:
            for where, line in numbered_lines(file, path):
                yield _sample(parse_object(line, where), where)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def _sample(record: dict[str, Any], where: str) -> SampleRecord:
    try:
        for key in TOKEN_FLOATS:
            values = record.get(key, ())  # runs of before have no entropies
            record[key] = [math.nan if value is None else value for value in values]
        if record.get("advantage") is None:
            record["advantage"] = math.nan
        sample = SampleRecord(**record)
    except TypeError as error:
        raise ValueError(f"{where}: no sample ({error})") from None
    for field in fields(sample):
        value, kind = getattr(sample, field.name), _KINDS[str(field.type)]
        many = str(field.type).startswith("Sequence")
        if isinstance(value, list) != many or not all(
            isinstance(one, kind) for one in (value if many else [value])
        ):
            raise ValueError(f"{where}: {field.name} = {short(value)} is not {field.type}")
    return sample


def read_mapping(path: Path) -> dict[str, Any]:
    """Of a YAML or JSON file; empty without one. Raises ValueError."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else _tree(text)  # YAML knows no 1e-06
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} and not a mapping")
    return value


def _tree(text: str) -> Any:
    """Of YAML without aliases, which nobody here writes: each may double what all readers see."""
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("it has aliases (*NAME), which no run writes")
    return yaml.safe_load(text)
