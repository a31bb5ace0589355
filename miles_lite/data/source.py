"""One data set as prompts: which fields of a row are what, rendered and tokenised on demand."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miles_lite.config import SourceConfig
from miles_lite.data.rows import Row, Rows, open_rows
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.types import Prompt
from miles_lite.untrusted import parse_json, short

logger = logging.getLogger(__name__)

MEASURED = 5000  # rows up to which all prompts are tokenised at the start; beyond, a sample
PROBES = 1000  # of that sample; also the prompts after which a share of long ones is believed
PATTERN_S = 5.0  # for label_pattern on one label: some never end
REWARD_KEYS = ("reward", "rm_type")  # in a row's metadata: which reward scores it


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What all sources of a run have in common."""

    tokenizer: ChatTokenizer
    template_kwargs: Mapping[str, Any]
    max_prompt_tokens: int
    max_too_long_ratio: float
    rewards: Collection[str]  # the names that a row may choose


@dataclass(frozen=True, slots=True)
class _Fields:
    """A row, understood."""

    messages: Sequence[Mapping[str, str]]
    label: str
    reward: str
    metadata: Mapping[str, Any]
    tools: list[Any]


def open_source(name: str, source: SourceConfig, settings: RenderSettings) -> Source:
    """Open and check: every row's fields, and the lengths of all prompts or of a sample of them.

    Raises ValueError naming file, line, field and value at fault.
    """
    opened = Source(name, source, settings, open_rows(source.path))
    if not len(opened):
        raise ValueError(f"{source.path} holds no rows")
    opened.check()
    return opened


class Source:
    """Prompts by row. Those of more than max_prompt_tokens are left out and counted."""

    def __init__(
        self, name: str, source: SourceConfig, settings: RenderSettings, rows: Rows
    ) -> None:
        self.name = name
        self._source, self._settings, self._rows = source, settings, rows
        self._label_pattern = re.compile(source.label_pattern)
        self._num_seen, self._too_long = 0, 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Changes with any row, and with whatever makes other prompts of the same rows."""
        source, settings = self._source, self._settings
        keys = (source.prompt_key, source.prompt_template, source.label_key, source.label_pattern)
        made = (source.reward, settings.tokenizer.fingerprint, settings.max_prompt_tokens)
        template = json.dumps(dict(settings.template_kwargs), sort_keys=True, default=str)
        text = repr((self._rows.digest, keys, made, template))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def prompt(self, index: int) -> Prompt | None:
        """The prompt of a row; None if it is too long. Raises ValueError when too many are."""
        where = self._rows.where(index)
        fields = self._fields(self._rows[index], where)
        tokenizer = self._settings.tokenizer
        try:
            text = tokenizer.render(fields.messages, self._settings.template_kwargs, fields.tools)
        except Exception as error:  # a chat template is a program: it raises what it likes
            raise ValueError(
                f"{where}: the chat template makes no prompt of {self._source.prompt_key} = "
                f"{short(fields.messages)}, tools = {short(fields.tools)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._num_seen += 1
        limit, least = self._settings.max_prompt_tokens, tokenizer.least_tokens(text)
        tokens = () if least > limit else tokenizer.encode(text)  # of megabytes it takes minutes
        if (found := max(least, len(tokens))) > limit:
            self._leave_out(index, f"{found} tokens{' or more' * (not tokens)}")
            return None
        uid = f"{self.name}:{self._rows.number(index)}"
        return Prompt(uid, tokens, text, fields.label, fields.reward, fields.metadata)

    def all(self) -> list[Prompt]:
        """Every prompt; for held-out sets."""
        return list(self._short_ones(step=1))

    def sample(self, number: int) -> list[Prompt]:
        """Up to `number` prompts from all over the source, at least one."""
        spread = self._short_ones(step=max(1, len(self) // number))
        found = list(itertools.islice(spread, number))
        return found or [next(self._short_ones(step=1))]

    def _short_ones(self, step: int) -> Iterator[Prompt]:
        """Prompts of every `step`th row, but for those that are too long."""
        for index in range(0, len(self), step):
            if (prompt := self.prompt(index)) is not None:
                yield prompt

    def check(self) -> None:
        """Read all rows; tokenise all prompts or a sample. Raises ValueError."""
        told = time.monotonic()
        for index in range(len(self)):
            with _time_limit(PATTERN_S if self._source.label_pattern else 0.0):
                self._fields(self._rows[index], self._rows.where(index))
            if time.monotonic() - told > 10:
                told = time.monotonic()
                logger.info("%s: checked %d of %d rows", self.name, index + 1, len(self))
        step = 1 if len(self) <= MEASURED else len(self) // PROBES
        measured = range(0, len(self), step)
        for index in measured:
            self.prompt(index)
        self._refuse_too_many(len(measured))
        if self._too_long == len(measured):
            raise ValueError(self._refusal("no prompt is short enough"))
        if self._too_long:
            logger.warning(
                "%s: %d of %d prompts looked at are longer than data.max_prompt_tokens = %d and "
                "are left out",
                *(self._source.path, self._too_long, len(measured)),
                self._settings.max_prompt_tokens,
            )
        self._num_seen = self._too_long = 0

    # ------------------------------------------------------------------ long prompts

    def _leave_out(self, index: int, length: str) -> None:
        self._too_long += 1
        if self._too_long == 1:
            self._first_too_long = f"{self._rows.where(index)} with {length}"
        self._refuse_too_many(PROBES)

    def _refuse_too_many(self, enough: int) -> None:
        """Raise ValueError if, of `enough` prompts seen or more, too large a share is too long."""
        ratio = self._too_long / max(1, self._num_seen)
        if self._num_seen >= enough and ratio > self._settings.max_too_long_ratio:
            raise ValueError(
                self._refusal(
                    f"{self._too_long} of {self._num_seen} prompts looked at are too long, more "
                    f"than data.max_too_long_ratio = {self._settings.max_too_long_ratio:g}"
                )
            )

    def _refusal(self, what: str) -> str:
        return (
            f"{self._source.path}: {what}: data.max_prompt_tokens = "
            f"{self._settings.max_prompt_tokens}; the first is {self._first_too_long}"
        )

    # ------------------------------------------------------------------ fields of a row

    def _fields(self, row: Row, where: str) -> _Fields:
        metadata = _metadata(row, where)
        return _Fields(
            messages=self._messages(row, where),
            label=self._label(row, where),
            reward=self._reward(metadata, where),
            metadata=metadata,
            tools=_tools(row, where),
        )

    def _messages(self, row: Row, where: str) -> Sequence[Mapping[str, str]]:
        """The chat; a text is one turn of the user."""
        key, template = self._source.prompt_key, self._source.prompt_template
        value = _value(row, key, where)
        if isinstance(value, str):
            content = template.replace("{prompt}", value) if template else value
            messages = [{"role": "user", "content": content}]
        else:
            if template:
                raise ValueError(
                    f"{where}: prompt_template is for prompts that are text, but {key} = "
                    f"{short(value)}"
                )
            messages = value
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ValueError(
                f"{where}: {key} = {short(value)} is neither a string nor a list of chat "
                'messages, such as [{"role": "user", "content": "..."}]'
            )
        if not any(message["content"].strip() for message in messages):
            raise ValueError(f"{where}: {key} = {short(value)} is empty")
        return messages

    def _label(self, row: Row, where: str) -> str:
        key = self._source.label_key
        value = _value(row, key, where)
        is_real = isinstance(value, float) and math.isfinite(value)  # NaN: no value
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, str) or is_integer or is_real):
            raise ValueError(f"{where}: {key} = {short(value)} is neither a string nor a number")
        label = str(value)
        if self._source.label_pattern:
            try:
                match = self._label_pattern.search(label)
            except _TooSlow:
                raise ValueError(
                    f"{where}: label_pattern = {self._source.label_pattern!r} was still trying "
                    f"{key} = {short(value)} after {PATTERN_S:g} s: what one of its repetitions "
                    "matches, another within or next to it should not"
                ) from None
            if match is None:
                raise ValueError(
                    f"{where}: {key} = {short(value)} does not match label_pattern = "
                    f"{self._source.label_pattern!r}"
                )
            label = match.group(1) or ""  # None where an optional group took no part
        if not label.strip():
            raise ValueError(f"{where}: {key} = {short(value)} is empty")
        return label

    def _reward(self, metadata: Mapping[str, Any], where: str) -> str:
        key = next((key for key in REWARD_KEYS if metadata.get(key)), None)
        name = metadata[key] if key else self._source.reward
        if not isinstance(name, str) or name not in self._settings.rewards:
            known = ", ".join(sorted(filter(None, self._settings.rewards))) or "none"
            field = f"metadata.{key}" if key else f"data source {self.name}, reward"
            raise ValueError(
                f"{where}: {field} = {short(name)} is none of reward.others: there are {known}"
            )
        return name


class _TooSlow(Exception):
    pass


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """_TooSlow after so long, 0 for never; in the main thread only, which alone can be told."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _value(row: Row, key: str, where: str) -> Any:
    """Of a key, or of a path of keys with dots."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{where}: no key {key!r}; the row has {', '.join(map(repr, row))}")
        value = value[part]
    return value


def _metadata(row: Row, where: str) -> Mapping[str, Any]:
    value = row.get("metadata") or {}
    if isinstance(value, str):
        value = parse_json(value, f"{where}: metadata")
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: metadata = {short(value)} is not an object")
    return value


def _tools(row: Row, where: str) -> list[Any]:
    value = row.get("tools") or []
    if not isinstance(value, list):
        raise ValueError(f"{where}: tools = {short(value)} is not a list")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
