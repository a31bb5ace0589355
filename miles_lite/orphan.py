"""No process outlives the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

SPAWNER = "MILES_LITE_SPAWNER"  # in the environment: pid of the process that spawned this one

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36
_forking = 0  # pid of the process that forks just now


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def adopt_orphans() -> None:
    """Whatever is started below this process and loses its parent becomes our child (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)


def bind_forks() -> None:
    """From now on whatever this process forks, and what those fork, dies with its parent."""
    os.register_at_fork(before=_remember, after_in_child=lambda: die_with(_forking))


def bind_spawns() -> None:
    """For a main module whose program spawns, when it is imported, which every spawned process does
    before all else: what was spawned dies with who spawned it, even if that one died already."""
    if SPAWNER in os.environ:
        die_with(int(os.environ[SPAWNER]))
    _be_spawner()
    os.register_at_fork(after_in_child=_be_spawner)


def _be_spawner() -> None:
    os.environ[SPAWNER] = str(os.getpid())


def _remember() -> None:
    global _forking
    _forking = os.getpid()
