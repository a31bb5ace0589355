"""One reward worker process, as the thread that started it sees it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from miles_lite.types import Verdict

START_S = 120.0  # for a worker to import the reward files
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from miles_lite.rollout.reward_worker import main; main(sys.argv[2])"
)


class Lost(Exception):
    """A worker no longer answers; the reason is the verdict on the answer it had in hand."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Worker:
    """Dies with the thread that starts it. `about` says what its functions are:
    {name: (whether it scores groups, what it wants besides response and label)}."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Returns when it is ready. Raises ValueError if it cannot load the reward."""
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | one_thread,
            start_new_session=True,  # Ctrl-C is the driver's; and killing it kills what it started
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._unread = b""
        try:
            (about,) = next(self._lines(START_S))
        except Lost as lost:
            self.bury()
            names = ", ".join(function for _, function, _ in settings["functions"].values())
            raise ValueError(f"a worker of reward {names}: {lost.reason}") from lost
        if isinstance(about, str):
            self.bury()
            raise ValueError(about)
        self.about: dict[str, tuple[bool, list[str]]] = about

    def send(self, wires: Sequence[bytes], timeout_s: float) -> None:
        """Ask questions; the worker reads all of them before it grades the first. Raises Lost."""
        rest = memoryview(b"[" + b",".join(wires) + b"]\n")
        deadline = time.monotonic() + timeout_s
        while rest:
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                if not _wait(self._requests, select.POLLOUT, deadline):
                    raise Lost("timeout") from None
            except OSError as error:
                raise Lost("crash") from error

    def verdicts(self, number: int, timeout_s: float) -> Iterator[list[list[Verdict]]]:
        """Those of the next `number` questions in order, in pieces as they come. Raises Lost for
        the first one missing."""
        for answers in self._lines(timeout_s):
            number -= len(answers)
            if number < 0:  # something else wrote to its pipe
                raise Lost("crash")
            try:
                yield [[Verdict(*result) for result in results] for results in answers]
            except TypeError as error:
                raise Lost("crash") from error
            if not number:
                return

    def kill(self) -> None:
        """Kill it and what it started, at once. Any thread may call this."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def bury(self) -> None:
        """Kill it and give back its pipes and its place in the process table."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _lines(self, timeout_s: float) -> Iterator[list[Any]]:
        """What the worker says, parsed, in pieces of whole lines, at most `timeout_s` apart."""
        while True:
            if not _wait(self._answers, select.POLLIN, time.monotonic() + timeout_s):
                raise Lost("timeout")
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise Lost("crash")
            lines, newline, self._unread = (self._unread + data).rpartition(b"\n")
            if newline:
                try:
                    yield json.loads(b"[" + lines.replace(b"\n", b",") + b"]")
                except ValueError as error:
                    raise Lost("crash") from error


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    """Whether a pipe became ready (or broke) by the deadline."""
    poller = select.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
