"""Log lines that say which process speaks, and timed spans. The same format in driver and ranks."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from miles_lite.redact import redacted

# What a terminal would obey instead of show: C0 and C1 controls, zero-width and direction marks,
# line separators, lone surrogates, the byte-order mark, tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def setup(role: str, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send this process's log to stderr, marked with who speaks: "trainer 3". Call once, early.

    Other libraries are heard from warnings on. A second call replaces the first.
    """
    who = role if rank is None else f"{role} {rank}"
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(who))
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h, _StderrHandler)]
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("miles_lite").setLevel(level)


@contextmanager
def span(name: str, seconds: MutableMapping[str, float]) -> Iterator[None]:
    """Add the seconds that the block takes to seconds[name]; also when it raises."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin


def printable(text: str, keep: str = "") -> str:
    """`text` with all that could steer a terminal escaped: for what a model or a data set wrote.

    keep: control characters to leave as they are, for example line ends.
    """

    def escape(match: re.Match[str]) -> str:
        char = match.group()
        return char if char in keep else char.encode("unicode_escape").decode("ascii")

    return _UNPRINTABLE.sub(escape, text)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print what may quote a model, a file or a setting: to stdout, or to `stream`."""
    print(printable(redacted(text), keep="\n\t"), file=stream, flush=True)


def say_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook: a trace ends in the message of an error, which may quote anything."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


class SafeStream(io.TextIOWrapper):
    """For sys.stdout and sys.stderr where code of others prints what a model wrote."""

    def write(self, text: str) -> int:
        return super().write(printable(text, keep="\n\t\r"))


def few(names: Sequence[str], at_most: int = 4) -> str:
    """ "a, b, c, d and 28 more"."""
    left = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {left} more" if left > 0 else "")


class _Formatter(logging.Formatter):
    def __init__(self, who: str) -> None:
        who = who.replace("%", "%%")
        super().__init__(f"%(asctime)s {who} %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record)), keep="\n\t")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment, so that a live view can put itself around it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr
