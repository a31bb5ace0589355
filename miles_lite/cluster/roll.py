"""The roll call: which rank did not arrive, and where, when a deadline passes.

A board lies beside the driver. Every rank writes on it once a second, from a thread of its own, in
which of our functions it is and whether it waits for others there; so the board tells of a rank
that cannot speak any more. When a deadline passes the driver reads it, names who is missing, and
leaves that on the board, where every rank finds it and says it in its own log.

Places are read off the running threads: nothing is noted in the training itself. On a GPU a rank
waits in a synchronisation instead of a collective, and is told by its place alone (not run).
"""

from __future__ import annotations

import contextlib
import json
import linecache
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING

from miles_lite.log import few

if TYPE_CHECKING:
    from miles_lite.cluster.rendezvous import TCPStore

logger = logging.getLogger(__name__)

ADDRESS, NAME = "MILES_LITE_BOARD", "MILES_LITE_NAME"  # in the environment of every rank
OURS = "miles_lite."  # modules whose functions are places
BEAT_S = 1.0
WATCH_S = 4.0  # for who has written nothing in so many beats is silent
STORE_S = 30.0  # of one look at the board
_VERDICT = "verdict"


@dataclass(frozen=True, slots=True)
class Note:
    """Of one rank."""

    beat: int  # grows while its thread runs
    clock: str  # of its host, for people
    phase: str  # that it has entered
    place: str  # functions of ours, outermost first; "" for none: nobody asked it for anything
    waits: bool  # for other ranks, there

    def where(self) -> str:
        return f"{self.phase or 'start'}: {self.place or 'asked for nothing'}"


# ------------------------------------------------------------------ a rank's side


class Here:
    """This process on the board. Does nothing where there is none."""

    def __init__(self) -> None:
        self.phase = ""
        if ADDRESS in os.environ:
            threading.Thread(target=self._beat, daemon=True, name="roll-call").start()

    def _beat(self) -> None:
        from torch.distributed import DistError

        from miles_lite.cluster.rendezvous import open_store

        name, beat, told = os.environ[NAME], 0, b""
        host, port = os.environ[ADDRESS].rsplit(":", 1)
        try:
            board = open_store(host, int(port), False, STORE_S)
            while True:
                beat += 1
                place, waits = whereabouts(sys._current_frames())
                note = Note(beat, time.strftime("%H:%M:%S"), self.phase, place, waits)
                board.set(name, json.dumps(asdict(note)))
                verdict = board.get(_VERDICT) if board.check([_VERDICT]) else b""
                if verdict != told:
                    logger.error("%s; here: %s", verdict.decode(), note.where())
                told = verdict
                time.sleep(BEAT_S)
        except DistError as error:  # the driver is gone, and this process soon too
            logger.info("the board is gone: %s", str(error).splitlines()[0])


def whereabouts(threads: Mapping[int, FrameType]) -> tuple[str, bool]:
    """In which functions of ours the threads are, and whether one waits for other ranks."""
    found = [_place(frame) for frame in threads.values()]
    return "; ".join(place for place, _ in found if place), any(waits for _, waits in found)


def _place(innermost: FrameType) -> tuple[str, bool]:
    stack = [innermost]
    while (outer := stack[-1].f_back) is not None:
        stack.append(outer)
    ours = [f for f in stack if f.f_globals.get("__name__", "").startswith(OURS)]
    if not ours or ours[-1].f_code is Here._beat.__code__:
        return "", False
    inner = [f for f in dict.fromkeys((innermost, *ours[:2])) if f is not ours[-1]]
    names = [f.f_code.co_qualname.replace("<locals>.", "") for f in (*inner, ours[-1])]
    number = innermost.f_lineno or 0  # None between the lines
    line = linecache.getline(innermost.f_code.co_filename, number)
    return " > ".join(reversed(names)), ".wait(" in line


# ------------------------------------------------------------------ the driver's side

_boards: list[tuple[TCPStore, str]] = []  # of this process, with their addresses
_spawned: dict[str, None] = {}  # whoever may write on the newest


@contextlib.contextmanager
def board(host: str) -> Iterator[None]:
    """For the ranks spawned meanwhile; `host` is this one, as they reach it."""
    from miles_lite.cluster.rendezvous import open_store

    store = open_store(host, 0, True, STORE_S)
    _boards.append((store, f"{host}:{store.port}"))
    _spawned.clear()
    try:
        yield
    finally:
        _boards.pop()


def environment(name: str) -> dict[str, str]:
    """Of a rank of that name."""
    if not _boards:
        return {}
    _spawned[name] = None
    return {ADDRESS: _boards[-1][1], NAME: name}


@dataclass(frozen=True, slots=True)
class Absence:
    """What a roll call found."""

    names: Sequence[str]  # who is missing; all that were called if nobody stands out
    told: str  # the same with where they are, and who waits for them; "" if nothing is known


def call(names: Sequence[str], what: str) -> Absence:
    """Who of these ranks, which were asked for `what`, is missing. Takes some seconds, in which it
    is seen who still writes; then all ranks are told."""
    if not _boards:
        return Absence(names, "")
    store, _ = _boards[-1]
    before = _read(store)
    time.sleep(WATCH_S if any(before.values()) else 0.0)
    found = absence(names, before, _read(store))
    if found.told:
        store.set(_VERDICT, f"{what} from: {found.told}")
        time.sleep(2 * BEAT_S)  # until all have said it
    return found


def _read(store: TCPStore) -> dict[str, Note | None]:
    return {n: Note(**json.loads(store.get(n))) if store.check([n]) else None for n in _spawned}


def absence(
    names: Sequence[str], before: Mapping[str, Note | None], now: Mapping[str, Note | None]
) -> Absence:
    """From the board as it was, and as it is some beats later. If none of those that were called
    stands out, one of the others may that is silent."""
    if not any(now.values()):
        return Absence(names, "")
    silent = [n for n, note in now.items() if note is None or note == before[n]]
    waiting = [n for n in names if n not in silent and (note := now.get(n)) and note.waits]
    busy = [n for n in names if n in now and n not in silent and n not in waiting]
    missing = [n for n in silent if n in names] or (busy if waiting else []) or silent
    if not missing:
        return Absence(names, few([f"{n} ({_told(now[n], False)})" for n in names if n in now]))
    told = few([f"{n} ({_told(now[n], n in silent)})" for n in missing])
    if waiting:
        places = few(sorted({note.where() for n in waiting if (note := now[n])}), 2)
        told += f", for which {few(waiting)} wait in {places}"
    return Absence(missing, told)


def _told(note: Note | None, silent: bool) -> str:
    if note is None:
        return "never heard"
    return f"silent since {note.clock}, then in {note.where()}" if silent else f"in {note.where()}"
