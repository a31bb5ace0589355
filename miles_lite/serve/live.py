"""The embedded engine in this process: every token reaches the event loop as it is drawn."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import EngineError, Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.rollout.embedded.scheduler import Running
from miles_lite.serve.choice import Drawn
from miles_lite.types import Finish, Request

Inbox = asyncio.Queue[Drawn | EngineError | None]  # None: the client is gone


class LiveEngine:
    """One engine of one process. Its methods belong to the event loop that `open` ran in."""

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        """Reads the weights of an HF folder."""
        self.model, self.options = NemotronH.from_folder(folder), options
        self._rank = EngineRank(self.model, EngineDims(tp=1, dp=1, ep=1), 0, options)
        self._rank.load_hf(folder)
        self._inboxes: dict[int, Inbox] = {}  # of unfinished requests
        self._uids = itertools.count()

    @property
    def num_running(self) -> int:
        """Requests not finished, nor given up."""
        return len(self._inboxes)

    @property
    def failure(self) -> str:
        """Why it serves no more; "" while it does."""
        return self._rank.server.failure

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rank.follow(self)
        self._rank.connect("")
        self._rank.set_version(0)
        self._rank.enter(Phase.generate)

    def close(self) -> None:
        if not self.failure:
            self._rank.cancel(self._inboxes)
            self._rank.close()

    def next_uid(self) -> int:
        return next(self._uids)

    def start(self, requests: Sequence[Request], inbox: Inbox) -> None:
        """Their tokens will come to `inbox`, or an EngineError. ValueError for one that can never
        fit, and then none is started."""
        try:
            self._rank.submit(requests)
        except RuntimeError as error:
            raise EngineError(str(error)) from error
        # before any token can have been delivered: that takes a turn of this event loop
        self._inboxes.update((request.uid, inbox) for request in requests)

    def cancel(self, uids: Iterable[int]) -> None:
        """Free their slots; nothing more comes of them."""
        mine = [uid for uid in uids if self._inboxes.pop(uid, None) is not None]
        if mine and not self.failure:
            self._rank.cancel(mine)

    # --- on the serving thread ---

    def stepped(self, sequences: Sequence[Running]) -> None:
        news = [
            Drawn(s.request.uid, s.tokens[-1], s.logprobs[-1], s.likeliest, s.finish)
            for s in sequences
            if s.finish is not Finish.abort  # nobody waits for what was given up
        ]
        self._loop.call_soon_threadsafe(self._deliver, news)

    def failed(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, reason)

    # --- back on the event loop ---

    def _deliver(self, news: Sequence[Drawn]) -> None:
        for drawn in news:
            if inbox := self._inboxes.get(drawn.uid):
                inbox.put_nowait(drawn)
                if drawn.finish:
                    del self._inboxes[drawn.uid]

    def _fail(self, reason: str) -> None:
        for inbox in set(self._inboxes.values()):
            inbox.put_nowait(EngineError(reason))
        self._inboxes.clear()
