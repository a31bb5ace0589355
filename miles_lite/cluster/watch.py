"""A Ray that this process started and that dies, or that this process leaves behind by dying."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence

import psutil

log = logging.getLogger(__name__)

_PARTS = {"gcs_server": "head (GCS)", "raylet": "node (raylet)"}
_AGENT = re.compile(r"Agent\s*$|agent(/main)?\.py$")


@contextlib.contextmanager
def watched(lost: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile, when a part of the Ray that this process started dies, `lost` is told by another
    thread and this process ends with status 1: no call to Ray, not even one that gives things back,
    would come to an end within a minute. After a Ray started by others these look themselves."""
    parts = [child for child in psutil.Process().children() if child.name() in _PARTS]
    if not parts or not hasattr(os, "pidfd_open"):  # not on Linux
        yield
        return
    handles = {os.pidfd_open(part.pid): _PARTS[part.name()] for part in parts}
    reaper = _reap_agents(parts)
    leave, left = os.pipe()

    def wait() -> None:
        dead = select.select([leave, *handles], [], [])[0]
        if leave not in dead:
            why = f"Ray's {handles[dead[0]]} on {os.uname().nodename} died"
            try:
                lost(why)
            except Exception as error:  # the disk that killed Ray may be as full for us
                log.error("%s; this could not be noted: %s", why, error)
            finally:
                os._exit(1)

    thread = threading.Thread(target=wait, daemon=True, name="ray-watch")
    thread.start()
    try:
        yield
    finally:
        os.close(left)
        thread.join()
        reaper.kill()
        reaper.communicate()
        for handle in (leave, *handles):
            os.close(handle)


def _reap_agents(parts: Sequence[psutil.Process]) -> subprocess.Popen[bytes]:
    """Start who kills Ray's agents when this process ends, however it ends: without their head they
    would stay for a minute. All else of Ray ends with this process."""
    agents = [
        str(child.pid)
        for part in parts
        for child in part.children()
        if any(_AGENT.search(word) for word in child.cmdline())
    ]
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read _; kill -9 "$@"', "ray-reaper", *agents],
        stdin=subprocess.PIPE,  # closes when we end
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
