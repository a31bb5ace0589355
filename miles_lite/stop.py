"""SIGTERM and SIGINT ask a run to stop at the end of the step; a second one does not wait, nor does
one outside of steps: while a run comes up, and when all is saved."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType

from miles_lite.protocols import RunError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDED_ITSELF = 3  # exit status of a run that ended for a reason which starting it again leaves


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, by signal `signum`. Nobody who handles errors is to swallow it: of
    what a handler raises, an event loop lets out only this kind, all else it keeps in a task."""

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, {what}")
        self.signum = signum


class AlarmError(RunError):
    """An alarm that is to end the run (alarms.stop). It has saved all it had."""


class StopRequest:
    """A context; inside it the signals are ours, whoever installed handlers before. They end what
    is under way at once, but for steps: the first one lets a step end and be saved."""

    def __init__(self) -> None:
        self._signum = 0
        self._error: Exception | None = None
        self._ended: Stopped | None = None  # what ended all at once
        self.in_steps = False

    @property
    def asked(self) -> bool:
        return self._signum != 0 or self._error is not None

    def ask(self, error: Exception) -> None:
        """The run itself asks, for that reason."""
        self._error = error

    def heed(self) -> None:
        """Raise Stopped, or the run's own reason, if there is one."""
        if self._signum:
            raise Stopped(self._signum, "all of it saved")
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What ended all at once comes out as itself: Ray makes other errors of it on its way."""
        try:
            yield
        except BaseException as error:
            if self._ended is None or isinstance(error, Stopped):
                raise
            raise self._ended from error

    def __enter__(self) -> StopRequest:
        self._before = {signum: signal.signal(signum, self._ask) for signum in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._signum or not self.in_steps:
            told = "at once: it goes on from its last checkpoint, if it has one"
            self._ended = Stopped(signum, told)
            raise self._ended
        self._signum = signum
        logger.warning(
            "%s: this step is finished and saved first; once more ends it at once",
            signal.Signals(signum).name,
        )
