"""What a killed process forked or spawned ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from miles_lite.orphan import SPAWNER

PROJECT = Path(__file__).resolve().parent.parent

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


SPAWNING = """
import multiprocessing, time
from miles_lite.orphan import bind_spawns
bind_spawns()

def child(generations):
    if generations:
        multiprocessing.get_context("spawn").Process(target=child, args=(generations - 1,)).start()
    else:
        print("all there", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    child(2)
"""


def test_spawned_children_die_with_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    process = subprocess.Popen(
        [sys.executable, "-m", "spawning"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert process.stdout and process.stdout.readline() == "all there\n"
    process.kill()
    process.communicate(timeout=30)  # the pipe closes when the last of them has ended


def test_a_child_whose_parent_died_before_it_ran_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = "from miles_lite.orphan import bind_spawns; bind_spawns(); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, SPAWNER: str(gone.pid)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
