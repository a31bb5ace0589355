"""Ray dies below a process whose last words cannot be written."""

from __future__ import annotations

import subprocess
import sys

DRIVER = """
import subprocess, sys, time
from miles_lite.cluster.watch import watched
from miles_lite.protocols import RunError

rename = "open('/proc/self/comm', 'w').write('raylet'); print(flush=True)"
words = [sys.executable, "-c", f"import time; {rename}; time.sleep(60)"]
ray = subprocess.Popen(words, stdout=subprocess.PIPE)
ray.stdout.readline()

def lost(why):
    raise RunError("cannot write summary.json: No space left on device")

with watched(lost):
    ray.kill()
    time.sleep(60)
"""


def test_who_cannot_note_that_ray_died_ends_all_the_same() -> None:
    words = [sys.executable, "-c", DRIVER]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Ray's node (raylet) on " in done.stderr and "No space left on device" in done.stderr
