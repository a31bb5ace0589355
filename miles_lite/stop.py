"""SIGTERM and SIGINT ask a run to stop at the end of the step; a second one does not wait."""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDED_ITSELF = 3  # exit status of a run that ended for a reason which starting it again leaves


class Stopped(Exception):
    """The run was asked to stop and has saved all it had. `signum`: by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, all of it saved")
        self.signum = signum


class AlarmError(RuntimeError):
    """An alarm that is to end the run (alarms.stop). It has saved all it had."""


class StopRequest:
    """A context; inside it the signals are ours, whoever installed handlers before."""

    def __init__(self) -> None:
        self._signum = 0
        self._error: Exception | None = None

    @property
    def asked(self) -> bool:
        return self._signum != 0 or self._error is not None

    def ask(self, error: Exception) -> None:
        """The run itself asks, for that reason."""
        self._error = error

    def heed(self) -> None:
        """Raise Stopped, or the run's own reason, if there is one."""
        if self._signum:
            raise Stopped(self._signum)
        if self._error is not None:
            raise self._error

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
        if self._signum:
            raise KeyboardInterrupt
        self._signum = signum
        logger.warning(
            "%s: this step is finished and saved first; once more ends it at once",
            signal.Signals(signum).name,
        )
