"""`miles-lite drift` has its engine in its own process: how it ends when that one dies or hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

STALL_S = 3
SCRIPT = """
import sys, time
from miles_lite import cli
from miles_lite.compose import compose
from miles_lite.drift import command
from miles_lite.rollout.embedded.serve import Server
from miles_lite.types import Sampling

def forward(*_):
    if how == "hangs":
        time.sleep(1e6)
    raise RuntimeError("out of luck")

def run(words):
    cfg = compose(["experiment=tiny", "rollout.engine.stall_s=%d"])
    with command._sides(cfg, cfg.model.path, 0) as sides:
        print("begin", time.time())
        Server._forward = forward
        sides.ask((5, 9, 3), Sampling(0, 4, 1.0, 1.0, 0, ()), ())

how, sys.argv, command.run = sys.argv[1], ["miles-lite", "drift"], run
cli.main()
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dies", r"engine rank 0 stopped serving in \S+: RuntimeError: out of luck"),
        ("hangs", rf"no step for {STALL_S} s \(rollout\.engine\.stall_s\)"),
    ],
)
def test_a_lost_engine_ends_it_by_name(how: str, told: str) -> None:
    done, seconds = drift(how)
    host = os.uname().nodename
    wanted = rf"^miles-lite drift: engine 0 rank 0 on {host}: {told}$"
    assert done.returncode == 1, done.stderr
    assert re.search(wanted, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < STALL_S + 7


def drift(how: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """And how long it took from the fault on."""
    command = [sys.executable, "-c", SCRIPT % STALL_S, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    begin = next(line for line in done.stdout.splitlines() if line.startswith("begin"))
    return done, time.time() - float(begin.split()[1])
