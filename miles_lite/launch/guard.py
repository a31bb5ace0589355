"""Runs a command and leaves nothing of it: `python -m miles_lite.launch.guard COMMAND ...`.

Between us and Ray, whose agents outlive a raylet that was killed. What loses its parent becomes a
child of the guard, so all that the command ever started is found below it and killed when the
command ends. When standard input closes, as it does when who started the guard dies, the command is
killed at once. SIGINT and SIGTERM are handed on. Leaves with the command's status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import psutil

from miles_lite.orphan import adopt_orphans, die_with


def main(command: list[str]) -> int:
    adopt_orphans()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=partial(die_with, os.getpid())
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: child.send_signal(number))
    threading.Thread(target=_kill_at_eof, args=(child,), daemon=True).start()
    code = child.wait()
    _end_family()
    return code if code >= 0 else 128 - code


def _kill_at_eof(child: subprocess.Popen[bytes]) -> None:
    os.read(sys.stdin.fileno(), 1)
    child.kill()


def _end_family() -> None:
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


if __name__ == "__main__":
    # not sys.exit: the thread may still hold standard input, and there is nothing to flush
    os._exit(main(sys.argv[1:]))
