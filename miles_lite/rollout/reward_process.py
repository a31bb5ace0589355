"""Reward workers as the threads that use them see them: a zygote forks them, pipes reach them.

The zygote is a process that has imported the reward files, sympy and all, and does nothing but
fork. So a worker costs milliseconds, and one that is stuck is left to itself and replaced.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from miles_lite.redact import without_secrets
from miles_lite.rollout.reward_worker import DROP, GO_ON
from miles_lite.types import Verdict

log = logging.getLogger(__name__)

START_S = 120.0  # for the zygote to import the reward files
FORK_S = 10.0  # for the zygote to fork
MAX_PIECES, PIECE_S = 16, 10.0  # of a line on a pipe, and between two of them
_MAX_ABOUT = 1 << 16  # bytes of what the zygote says of its functions
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from miles_lite.rollout.reward_worker import main; main(sys.argv[2])"
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

About = dict[str, tuple[bool, list[str]]]


class Lost(Exception):
    """A worker no longer answers; the reason is the verdict on the answer it had in hand."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Slow(Exception):
    """The answer that a worker has in hand takes longer than its caller has patience: it has spent
    `spent_s` up to now, and computes, or else waits for something."""

    def __init__(self, spent_s: float, computes: bool) -> None:
        super().__init__(spent_s, computes)
        self.spent_s, self.computes = spent_s, computes


class Zygote:
    """Forks workers, and is started anew if it died. `about` says what the functions are:
    {name: (whether it scores groups, what it wants besides response and label)}."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Returns when the reward files are imported. Raises ValueError if they cannot be."""
        self._settings = settings
        self._lock = threading.Lock()  # one thread at a time talks through _control
        self._closed = False
        self._process: subprocess.Popen[bytes]
        self.about: About
        self._start()

    def fork(self) -> Worker:
        """A new worker, ready to be asked. Raises Lost if none can be had."""
        with self._lock:
            try:
                try:
                    return self._fork()
                except (OSError, EOFError):
                    if self._closed:
                        raise
                    self._control.close()
                    self._process.kill()  # it may be stuck or stopped
                    self._start()
                    return self._fork()
            except (OSError, EOFError, ValueError) as error:
                raise Lost("crash") from error

    def _fork(self) -> Worker:
        ask_end, requests = os.pipe()
        answers, tell_end = os.pipe()
        try:
            socket.send_fds(self._control, [b"fork"], [ask_end, tell_end])
            pid = self._control.recv(64)
            if not pid:
                raise EOFError("the reward zygote is gone")
        except BaseException:
            os.close(requests)
            os.close(answers)
            raise
        finally:
            os.close(ask_end)
            os.close(tell_end)
        return Worker(self, int(pid), requests, answers)

    def kill(self, pid: int) -> None:
        """Kill one that it forked, and what that one started."""
        with self._lock:
            try:
                self._control.send(b"kill %d" % pid)
            except OSError:  # the zygote is gone, and so are those it forked
                pass

    def close(self) -> None:
        """It kills all that it forked, and ends."""
        with self._lock:
            self._closed = True
            self._control.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(self._settings)]
        # an option may name the variable with the key that its function is to have
        options = [options for *_, options in self._settings["functions"].values()]
        named = frozenset(str(value) for some in options for value in some.values())
        env = without_secrets(os.environ, named)
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

        def keep() -> None:
            """The kernel kills the zygote when the thread that started it ends: after it, here."""
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    env=env,
                    start_new_session=True,  # Ctrl-C is the driver's
                )
            self._process.wait()

        threading.Thread(target=keep, daemon=True, name="reward-zygote").start()
        ours.settimeout(START_S)
        names = ", ".join(function for _, function, _ in self._settings["functions"].values())
        try:
            told = ours.recv(_MAX_ABOUT)
            answer = json.loads(told) if told else f"reward {names}: crash while importing"
        except TimeoutError:
            answer = f"reward {names}: importing took longer than {START_S:.0f} s"
        if isinstance(answer, str):
            ours.close()
            raise ValueError(answer)
        ours.settimeout(FORK_S)
        self._control, (self.pid, self.about, weakness) = ours, answer
        if weakness:
            log.warning(
                "Python alone keeps reward workers off the network, compiled code may not: %s",
                weakness,
            )


class Worker:
    """A process that grades what it is sent, one answer after the other."""

    def __init__(self, zygote: Zygote, pid: int, requests: int, answers: int) -> None:
        """`requests` and `answers` are our ends of its pipes."""
        self.pid = pid
        self._zygote = zygote
        self._requests, self._answers = requests, answers
        os.set_blocking(requests, False)
        self._unread = b""
        self._is_lost = False  # it may grade what others were given, or never end

    def is_fit(self) -> bool:
        """Whether it lives, has nothing in hand, and said nothing that it was not asked."""
        return not self._is_lost and not _wait(self._answers, select.POLLIN, 0.0)

    def send(self, wires: Sequence[bytes], timeout_s: float) -> None:
        """Ask questions; the worker reads all of them before it grades the first. Raises Lost."""
        rest = memoryview(b"[" + b",".join(wires) + b"]\n")
        deadline = time.monotonic() + timeout_s
        while rest:
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                if not _wait(self._requests, select.POLLOUT, deadline - time.monotonic()):
                    raise Lost("timeout") from None
            except OSError as error:
                raise Lost("crash") from error

    def verdicts(self, number: int, patience_s: float) -> Iterator[list[list[Verdict]]]:
        """Those of the next `number` questions in order, in pieces as they come.

        Raises Lost for the first one missing, and Slow if that one has waited for something, or
        computed, for `patience_s` and more. One that gets no core is not slow.
        """
        while number:
            began, busy_since = time.monotonic(), math.inf  # the latter in seconds of its own
            while not _wait(self._answers, select.POLLIN, patience_s):
                cpu_s, is_running = self._cpu()
                if not is_running or cpu_s - busy_since >= patience_s / 2:
                    raise Slow(time.monotonic() - began, is_running)
                busy_since = min(busy_since, cpu_s)
            verdicts, asks = self._read()
            number -= len(verdicts)
            if number < 0:  # something else wrote to its pipe
                raise Lost("crash")
            if asks:
                self._say(GO_ON)
            yield verdicts

    def verdict_in_hand(self, timeout_s: float) -> list[Verdict]:
        """That of the question it is at. It drops the rest of its batch, or is not fit any more.
        Raises Lost."""
        self._is_lost = True
        deadline = time.monotonic() + timeout_s
        while _wait(self._answers, select.POLLIN, deadline - time.monotonic()):
            verdicts, asks = self._read()
            if verdicts:
                if asks and len(verdicts) == 1:
                    self._say(DROP)
                    self._is_lost = False
                return verdicts[0]
        raise Lost("timeout")

    def kill(self) -> None:
        """Kill it and what it started. Any thread may call this; its pipes then end."""
        self._zygote.kill(self.pid)

    def bury(self) -> None:
        """Kill it and give back its pipes."""
        self.kill()
        os.close(self._requests)
        os.close(self._answers)

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._requests, word)
        except OSError:  # it just died; whoever waits for its next verdict will see
            pass

    def _read(self) -> tuple[list[list[Verdict]], bool]:
        """What it says, in whole lines, and whether it asks to go on. Raises Lost, also where it
        talks on and on without saying anything."""
        newline = b""
        for _ in range(MAX_PIECES):
            data = os.read(self._answers, 1 << 16)
            lines, newline, self._unread = (self._unread + data).rpartition(b"\n")
            if newline or not data or not _wait(self._answers, select.POLLIN, PIECE_S):
                break
        try:
            if not newline:
                raise EOFError
            answers = json.loads(b"[" + lines.replace(b"\n", b",") + b"]")
            verdicts = [[Verdict(*result) for result in results] for results, _ in answers]
            return verdicts, answers[-1][1]
        except (EOFError, ValueError, TypeError, RecursionError) as error:  # it means nothing
            raise Lost("crash") from error

    def _cpu(self) -> tuple[float, bool]:
        """Seconds it has computed, and whether it has, or would use, a core just now. Raises Lost
        if it is dead, while something that it started holds its pipes."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError) as error:  # gone before or after the opening
            raise Lost("crash") from error
        if fields[0] in "ZX":
            raise Lost("crash")
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, fields[0] == "R"


def _wait(descriptor: int, event: int, timeout_s: float) -> bool:
    """Whether a pipe became ready (or broke) in time."""
    poller = select.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, timeout_s) * 1000))
