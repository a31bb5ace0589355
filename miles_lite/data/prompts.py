"""Prompts from a file, and the cursor that deals them out and can be put back where it was.

A row has a prompt, which is a string or a list of chat messages, and a label:

    {"prompt": [{"role": "user", "content": "What is 17+58?"}], "label": "75"}
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.types import Prompt

logger = logging.getLogger(__name__)

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


def load_prompts(
    path: str,
    tokenizer: ChatTokenizer,
    *,
    prompt_key: str,
    label_key: str,
    template_kwargs: Mapping[str, Any],
    max_prompt_len: int,
) -> list[Prompt]:
    """The rows of a .jsonl or .parquet file, rendered and tokenised once.

    `path` may end in a slice, `train.jsonl@[:100]`, which picks rows as a Python slice does; a
    prompt's uid is its row number in the whole file. Prompts of more than `max_prompt_len` tokens
    are left out and counted in the log. ValueError names file, line, key and value at fault.
    """
    file, rows = _rows(path)
    prompts: list[Prompt] = []
    too_long: list[int] = []  # row numbers
    for uid, row in rows:
        where = f"{file}:{uid + 1}"
        text = _render(row, prompt_key, where, tokenizer, template_kwargs)
        label = _label(row, label_key, where)
        tokens = tokenizer.encode(text)
        if len(tokens) > max_prompt_len:
            too_long.append(uid)
        else:
            prompts.append(Prompt(uid=uid, tokens=tokens, text=text, label=label))
    if too_long:
        logger.warning(
            "%s: left out %d of %d prompts, longer than data.max_prompt_tokens = %d; first row %d",
            *(path, len(too_long), len(rows), max_prompt_len, too_long[0]),
        )
    if not prompts:
        limit = f"all are longer than data.max_prompt_tokens = {max_prompt_len}"
        raise ValueError(f"{path} holds no prompt to use: {limit if rows else 'no rows'}")
    return prompts


class PromptSource:
    """Deals prompts in a new seeded order each epoch, without end.

    The order depends on seed, epoch and number of prompts alone, so a position is two numbers.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("a prompt source needs at least one prompt")
        self.prompts = tuple(prompts)
        self.seed = seed
        self._fingerprint = _fingerprint(self.prompts)
        self._move_to(epoch=0, position=0)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts. An epoch ends exactly where its last prompt does, even inside."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self.prompts):
                self._move_to(self._epoch + 1, 0)
            index = self._order[self._position]
            self._position += 1
            taken.append(self.prompts[index])
        return taken

    def state(self) -> dict[str, int | str]:
        """What `restore` needs; plain JSON."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "num_prompts": len(self.prompts),
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Go on as the source that gave `state` would; ValueError if it dealt other prompts."""
        mine = self.state()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"the saved prompt position lacks {', '.join(missing)}")
        for key in ("num_prompts", "fingerprint", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"cannot resume: the saved prompt position has {key} = {state[key]!r}, this "
                    f"run has {mine[key]!r}; resume with the same data, prompt settings and seed, "
                    "or start a new run"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self.prompts):
            raise ValueError(f"cannot resume: epoch {epoch}, position {position} is out of range")
        self._move_to(epoch, position)

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position  # in the epoch's order; number of prompts already dealt
        self._order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{epoch}").shuffle(self._order)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes with any token or label, and with the order of rows."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.uid, prompt.tokens, prompt.label)).encode())
    return digest.hexdigest()[:16]


def _render(
    row: Mapping[str, Any],
    key: str,
    where: str,
    tokenizer: ChatTokenizer,
    template_kwargs: Mapping[str, Any],
) -> str:
    """The row's prompt through the chat template; a string is one user turn."""
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}; the row has {', '.join(map(repr, row))}")
    value = row[key]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(
            f"{where}: {key} = {_short(value)} is neither a string nor a list of chat messages, "
            'such as [{"role": "user", "content": "..."}]'
        )
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{where}: {key} = {_short(value)} is empty")
    return tokenizer.render(messages, template_kwargs)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _label(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}; the row has {', '.join(map(repr, row))}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {key} = {_short(value)} is neither a string nor a number")
    if not str(value).strip():
        raise ValueError(f"{where}: {key} = {_short(value)} is empty")
    return str(value)


def _rows(path: str) -> tuple[Path, list[tuple[int, dict[str, Any]]]]:
    """The file behind `path` and (row number, row) of the slice it asks for."""
    sliced = _SLICE.fullmatch(path)
    file = Path(sliced["path"] if sliced else path)
    if not file.is_file():
        raise ValueError(f"no data file {file}")
    if file.suffix == ".jsonl":
        raw = _read_jsonl(file)
    elif file.suffix == ".parquet":
        raw = list(enumerate(_read_parquet(file)))
    else:
        raise ValueError(f"{file} is neither .jsonl nor .parquet")
    if sliced:
        start, stop = (int(end) if end else None for end in sliced.group("start", "stop"))
        raw = raw[start:stop]
    return file, raw


def _read_jsonl(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    with file.open(encoding="utf-8") as lines:
        for uid, line in enumerate(lines):
            if not line.strip():
                continue  # a blank line, usually the last, is no row but counts as a line
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{uid + 1}: not JSON ({error}): {_short(line)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{uid + 1}: {_short(row)} is not a JSON object")
            rows.append((uid, row))
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet  # optional: only those with parquet data need it
    except ImportError:
        raise ValueError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    return parquet.read_table(file).to_pylist()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
