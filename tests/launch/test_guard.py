"""Nothing of a command outlives its guard, and nothing of the guard who started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

# a command whose grandchild has left its session and ignores what it is asked
COMMAND = """
import signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
middle = "import subprocess, sys; "
middle += "subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.run([sys.executable, "-c", middle, code])
print("up", flush=True)
time.sleep({seconds})
sys.exit(7)
"""


def guarded(deaf: bool, seconds: float) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A guard, and all that is below it: the command and an orphan."""
    code = COMMAND.format(deaf=deaf, seconds=seconds)
    guard = subprocess.Popen(
        [sys.executable, "-m", "miles_lite.launch.guard", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdout is not None and guard.stdout.readline() == "up\n"
    family = psutil.Process(guard.pid).children(recursive=True)
    assert len(family) == 2
    return guard, family


def end(guard: subprocess.Popen[str]) -> int:
    """Its status; its pipe stays open meanwhile."""
    try:
        return guard.wait(20)
    finally:
        guard.kill()
        assert guard.stdin is not None and guard.stdout is not None
        guard.stdin.close()
        guard.stdout.close()


def test_the_status_is_the_commands_and_orphans_end_with_it() -> None:
    guard, family = guarded(deaf=False, seconds=1)
    assert end(guard) == 7
    assert not any(process.is_running() for process in family)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_closed_pipe_kills_all(deaf: bool) -> None:
    guard, family = guarded(deaf, seconds=600)
    assert guard.stdin is not None
    guard.stdin.close()
    assert end(guard) == 128 + signal.SIGKILL
    assert not any(process.is_running() for process in family)


def test_a_signal_is_handed_on() -> None:
    guard, family = guarded(deaf=False, seconds=600)
    time.sleep(0.2)
    guard.send_signal(signal.SIGTERM)
    assert end(guard) == 128 + signal.SIGTERM
    assert not any(process.is_running() for process in family)
