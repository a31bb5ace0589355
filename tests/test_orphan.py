"""What a killed process forked ends with it."""

from __future__ import annotations

import subprocess
import sys

import psutil

FAMILY = """
import os, sys, time
from miles_lite.orphan import bind_forks
bind_forks()
if os.fork() == 0:
    if os.fork() == 0:
        if os.fork() == 0:
            print("all there", flush=True)
time.sleep(120)
"""


def test_children_of_children_die_with_a_killed_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "all there\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    process.kill()
    process.communicate(timeout=30)  # the pipe closes when the last of them has ended
    assert all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in family)
