"""Deals prompts of one or several sources, each in a new seeded order each epoch, without end."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from miles_lite.data.source import Source
from miles_lite.types import Prompt

MAX_PUT_BACK = 65_536  # prompts that can be put back


class PromptSource:
    """Implements protocols.PromptStream.

    A source's order depends on seed, its name, epoch and number of rows alone, and whose turn it is
    on the weights and on what was dealt: a position is three numbers a source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        if not sources:
            raise ValueError("a prompt source needs at least one data set")
        self.seed = seed
        self._cursors = [
            _Cursor(source, weight, seed) for source, weight in zip(sources, weights, strict=True)
        ]
        self._history: deque[tuple[_Cursor, tuple[int, int, int]]] = deque(maxlen=MAX_PUT_BACK)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts. A source's epoch ends exactly where its last prompt does."""
        return [self._next() for _ in range(n)]

    def put_back(self, n: int) -> None:
        """The last `n` prompts taken come next again."""
        assert n <= len(self._history), f"{n} prompts put back, {len(self._history)} were taken"
        for _ in range(n):
            cursor, place = self._history.pop()
            cursor.go_to(*place)

    def _next(self) -> Prompt:
        # whose share is the most behind; the first of equals
        cursor = min(self._cursors, key=lambda c: (c.num_dealt + 1) / c.weight)
        self._history.append((cursor, cursor.place))
        return cursor.deal()

    def state(self) -> dict[str, Any]:
        """What `restore` needs; plain JSON."""
        return {"seed": self.seed, "sources": {c.source.name: c.state() for c in self._cursors}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state` would; ValueError if it dealt other prompts."""
        mine = self.state()
        if state.get("seed") != mine["seed"]:
            raise _Different("seed", state.get("seed"), mine["seed"])
        found = state.get("sources")
        saved = {
            name: place if isinstance(place, Mapping) else {}
            for name, place in (found.items() if isinstance(found, Mapping) else ())
        }
        if list(saved) != list(mine["sources"]):
            raise _Different("data sets", list(saved), list(mine["sources"]))
        for name, ours in mine["sources"].items():
            for key in ("weight", "num_rows", "fingerprint"):
                if saved[name].get(key) != ours[key]:
                    raise _Different(f"{key} of data set {name}", saved[name].get(key), ours[key])
        places = {c: _place(saved[c.source.name], len(c.source)) for c in self._cursors}
        for cursor, place in places.items():
            cursor.go_to(*place)
        self._history.clear()


def _place(saved: Mapping[str, Any], num_rows: int) -> tuple[int, int, int]:
    """Epoch, position and number dealt. Raises ValueError for what no source can have said."""
    place = (saved.get("epoch", -1), saved.get("position", -1), saved.get("num_dealt", -1))
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in place) or place[1] > num_rows:
        raise ValueError(
            "cannot resume: the saved prompt position is damaged: epoch = {!r}, position = {!r}, "
            "num_dealt = {!r}, ".format(*place)
            + f"of {num_rows} rows"
        )
    return place


class _Different(ValueError):
    def __init__(self, what: str, saved: Any, mine: Any) -> None:
        super().__init__(
            f"cannot resume: the saved prompt position has {what} = {saved!r}, this run has "
            f"{mine!r}; resume with the same data, prompt settings and seed, or start a new run"
        )


class _Cursor:
    """Where one source stands."""

    def __init__(self, source: Source, weight: float, seed: int) -> None:
        self.source, self.weight, self._seed = source, weight, seed
        self._epoch = -1
        self.go_to(epoch=0, position=0, num_dealt=0)

    @property
    def place(self) -> tuple[int, int, int]:
        return self._epoch, self._position, self.num_dealt

    def go_to(self, epoch: int, position: int, num_dealt: int) -> None:
        if epoch != self._epoch:
            self._order = array("q", range(len(self.source)))
            random.Random(f"{self._seed}/{self.source.name}/{epoch}").shuffle(self._order)
        self._epoch, self._position, self.num_dealt = epoch, position, num_dealt

    def deal(self) -> Prompt:
        """The next prompt that is not too long."""
        for _ in range(2 * len(self.source)):
            if self._position == len(self.source):
                self.go_to(self._epoch + 1, 0, self.num_dealt)
            index = self._order[self._position]
            self._position += 1
            if (prompt := self.source.prompt(index)) is not None:
                self.num_dealt += 1
                return prompt
        raise ValueError(f"data set {self.source.name}: no prompt is short enough")

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_dealt": self.num_dealt,
            "weight": self.weight,
            "num_rows": len(self.source),
            "fingerprint": self.source.fingerprint,
        }
