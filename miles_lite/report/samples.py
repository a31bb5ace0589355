"""Which samples travel in a report: all if they fit, else some of every step and of every kind.

Whole sample files are large (a step of a big run has millions of tokens), so files are read in an
order that covers the run ever more finely, until enough bytes were read.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.records import SampleRecord, read_samples
from miles_lite.report.runs import RunData

READ_BYTES = 64 << 20  # of sample files, compressed, over all runs of a report
FILE_TOKENS = 400_000  # of one file, which are some 4 MB of it
KEPT_TOKENS = 1_500_000  # that are considered: more than fit a file of any budget
_CHUNK = 64 << 10  # bytes of JSON between looks at the compressed size
_TRAILER = 64  # bytes that end a gzip stream
_MAX_PIECES = 8  # tokens that one character may take


@dataclass(frozen=True, slots=True)
class Chosen:
    packed: bytes  # gzip of JSON lines
    num_chosen: int
    num_seen: int  # in the files that were read
    num_files: int
    num_files_read: int
    all_read: bool  # no file was left out, or left half-way
    notes: Sequence[str]

    @property
    def told(self) -> str:
        if self.num_chosen == self.num_seen and self.all_read:
            return f"All {self.num_seen:,} samples of the runs."
        return (
            f"{self.num_chosen:,} of {self.num_seen:,} samples "
            f"{'' if self.all_read else 'read '}from {self.num_files_read:,} of "
            f"{self.num_files:,} sample files: the newest steps first, then evenly over the steps, "
            "of each verdict and reward. All are in the run folders."
        )


@dataclass(frozen=True, slots=True)
class _File:
    run: int
    step: int
    held_out: str  # set; "" in training
    path: Path


def choose(runs: Sequence[RunData], budget: int) -> Chosen:
    """So many samples that their packed size is about `budget` bytes at most."""
    files = _files(runs)
    decoders, notes = [], []
    for run in runs:
        pieces, note = _pieces_of(run)
        decoders.append(pieces)
        notes += [f"{run.name}: {note}"] if note else []
    by_file: list[list[tuple[_File, SampleRecord]]] = []
    num_seen = num_read = num_bytes = 0
    all_read = True
    room = KEPT_TOKENS
    for file in files:
        if num_bytes > READ_BYTES:
            break
        num_bytes += min(file.path.stat().st_size, READ_BYTES // 16)
        num_read += 1
        records, is_whole = _begin(read_samples(file.path), FILE_TOKENS)
        all_read &= is_whole
        num_seen += len(records)
        kept = _within(_of_every_kind(records), room // (len(files) - num_read + 1))
        room -= sum(len(record.tokens) for record in kept)
        by_file.append([(file, record) for record in kept])
    plain = (_plain(file, record, decoders[file.run]) for file, record in _in_turns(by_file))
    packed, num_chosen = _pack(plain, budget)
    all_read &= num_read == len(files)
    return Chosen(packed, num_chosen, num_seen, len(files), num_read, all_read, notes)


# ------------------------------------------------------------------ which


def _files(runs: Sequence[RunData]) -> list[_File]:
    """Of all runs in turns, each in an order that begins with its newest and halves the gaps."""
    each = []
    for index, run in enumerate(runs):
        found = [_File(index, _step(p), "", p) for p in run.folder.glob("samples/step_*.jsonl.gz")]
        found += [
            _File(index, _step(p), p.parent.name, p)
            for p in run.folder.glob("eval/*/step_*.jsonl.gz")
        ]
        found.sort(key=lambda file: (-file.step, file.held_out))
        each.append([found[i] for i in _halving(len(found))])
    return list(_in_turns(each))


def _begin(records: Iterator[SampleRecord], num_tokens: int) -> tuple[list[SampleRecord], bool]:
    """(records until there are so many tokens, whether those are all)."""
    begun, left = [], num_tokens
    for record in records:
        if left <= 0:
            return begun, False
        begun.append(record)
        left -= len(record.tokens)
    return begun, True


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").split(".")[0])


def _halving(count: int) -> list[int]:
    """0 ... count - 1: the ends first, then what halves the widest gaps, and so on."""
    order = dict.fromkeys([0, count - 1][:count])
    gap = max(1, count - 1)
    while gap > 1:
        gap = (gap + 1) // 2
        order |= dict.fromkeys(range(0, count, gap))
    return list(order)


def _in_turns(lists: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The first of each, the second of each, ..."""
    for row in zip_longest(*lists):
        yield from (item for item in row if item is not None)


def _of_every_kind(records: Sequence[SampleRecord]) -> list[SampleRecord]:
    """The same records: one of each verdict, reward and ending first, then another of each."""
    kinds: dict[tuple[str, float, str], list[SampleRecord]] = defaultdict(list)
    for record in records:
        kinds[record.invalid, round(record.reward, 1), record.finish].append(record)
    return list(_in_turns(list(kinds.values())))


def _within(records: Sequence[SampleRecord], num_tokens: int) -> list[SampleRecord]:
    """The first ones that have so many tokens together; at least one."""
    ends = accumulate(len(record.tokens) for record in records)
    return [
        r
        for i, (r, end) in enumerate(zip(records, ends, strict=True))
        if i == 0 or end <= num_tokens
    ]


def _pack(samples: Iterator[dict[str, Any]], budget: int) -> tuple[bytes, int]:
    """(at most `budget` bytes, how many samples are in them)."""
    stream = zlib.compressobj(6, wbits=16 + zlib.MAX_WBITS)
    packed, num_chosen = b"", 0
    lines = (json.dumps(sample, separators=(",", ":")).encode() + b"\n" for sample in samples)
    for chunk in _chunks(lines):
        ahead = stream.copy()
        more = ahead.compress(b"".join(chunk)) + ahead.flush(zlib.Z_SYNC_FLUSH)
        if len(packed) + len(more) > budget - _TRAILER:
            break
        packed, num_chosen, stream = packed + more, num_chosen + len(chunk), ahead
    return packed + stream.flush(), num_chosen


def _chunks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for line in lines:
        chunk.append(line)
        if sum(map(len, chunk)) > _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ------------------------------------------------------------------ one sample


def _plain(file: _File, record: SampleRecord, pieces: _Pieces | None) -> dict[str, Any]:
    """With short keys, since there are thousands; page.js says what they are."""
    texts = pieces.of(record.tokens) if pieces else [f"[{token}]" for token in record.tokens]
    drift = [
        _digits(ours - theirs, 3)
        for ours, theirs in zip(record.trainer_logprobs, record.logprobs, strict=False)
    ]
    plain = {
        "r": file.run,
        "s": record.step,
        "h": file.held_out,
        "u": record.prompt_uid,
        "p": record.prompt,
        "l": record.label,
        "w": _digits(record.reward, 6),
        "v": record.invalid,
        "f": record.finish,
        "g": record.version,
        "a": _digits(record.advantage, 4),
        "i": list(record.tokens),
        "t": texts,
        "e": [_digits(value, 6) for value in record.logprobs],
        "d": drift,
        "n": [_digits(value, 3) for value in record.entropies],
    }
    if "".join(texts) != record.response:  # no tokenizer, or bytes that are no text
        plain["x"] = record.response
    return plain


def _digits(value: float, digits: int) -> float | int | str:
    """A number of so many digits, or the name of one that JSON has no word for."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded


class _Pieces:
    """Tokens as the text that each adds. A character of several tokens is the first one's."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, tokens: Sequence[int]) -> list[str]:
        texts: list[str] = []
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            text = self._text(pending)
            if "\N{REPLACEMENT CHARACTER}" in text and len(pending) < _MAX_PIECES:
                continue
            texts += [text, *[""] * (len(pending) - 1)]
            pending = []
        if pending:
            texts += [self._text(pending), *[""] * (len(pending) - 1)]
        return texts

    def _text(self, tokens: Sequence[int]) -> str:
        if len(tokens) > 1:
            return self._tokenizer.decode(tokens)
        (token,) = tokens
        if token not in self._known:
            self._known[token] = self._tokenizer.decode(tokens)
        return self._known[token]


def _pieces_of(run: RunData) -> tuple[_Pieces | None, str]:
    """By the tokenizer of the model trained, or of the one it left; or why there is neither."""
    told = "its model is not known"
    places = [run.folder / "hf"]
    if "model.path" in run.config:
        places.append(Path(str(run.config["model.path"])))
    for folder in places:
        try:
            return _Pieces(ChatTokenizer.load(folder)), ""
        except ValueError as error:
            told = str(error)
    return None, f"tokens are shown by number ({told})"


def unpack(packed: bytes) -> list[dict[str, Any]]:
    """What `choose` packed."""
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]
