"""A connection to Ray and the devices reserved in it, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import psutil
import ray
from ray.util.placement_group import remove_placement_group

from miles_lite.cluster import CPU_DEVICE
from miles_lite.cluster.placement import Bundle, reserve
from miles_lite.config import ClusterConfig

log = logging.getLogger(__name__)

_AGENT = re.compile(r"Agent\s*$|agent(/main)?\.py$")
_PARTS = {"gcs_server": "head (GCS)", "raylet": "node (raylet)"}


@contextlib.contextmanager
def open_session(
    cluster: ClusterConfig,
    num_devices: int,
    device: str,
    lost: Callable[[str], None] = log.error,
) -> Iterator[list[Bundle]]:
    """Start or join Ray, reserve `num_devices` devices, give all back on leaving.

    A local Ray is sized for the run: on a CPU every rank gets a pretended device, however few cores
    there are. When a part of it dies `lost` is told, by another thread, and this process ends: no
    call to Ray, not even one that gives things back, would come to an end.
    """
    if " " in sys.executable:
        raise ValueError(
            f"Ray cannot start processes with {sys.executable!r}: there is a space in the path; "
            "move the project or its environment to a path without one"
        )
    resource = "GPU" if device == "cuda" else CPU_DEVICE
    local = cluster.address == "local"
    ray.init(
        address=cluster.address,
        resources={CPU_DEVICE: num_devices} if local and device == "cpu" else None,
        num_cpus=max(os.cpu_count() or 1, 1) if local else None,
        include_dashboard=False if local else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
        configure_logging=False,
    )
    leaving = threading.Event()
    _watch(leaving, lost)
    try:
        bundles = reserve(num_devices, resource, cluster.start_timeout_s)
        try:
            yield bundles
        finally:
            remove_placement_group(bundles[0].group)
    finally:
        leaving.set()
        ray.shutdown()


def _watch(leaving: threading.Event, lost: Callable[[str], None]) -> None:
    """Wait, in a thread, for the death of a part of the Ray that this process started, if it did.
    Of another one the launcher looks after."""
    children = [child for child in psutil.Process().children() if child.name() in _PARTS]
    if not children or not hasattr(os, "pidfd_open"):  # not on Linux
        return
    parts = {os.pidfd_open(child.pid): child.name() for child in children}
    reaper = _reap_agents(children)

    def wait() -> None:
        dead = select.select(list(parts), [], [])[0][0]
        if not leaving.is_set():
            lost(f"Ray's {_PARTS[parts[dead]]} on {os.uname().nodename} died")
            os._exit(1)
        reaper.kill()
        reaper.communicate()
        for handle in parts:
            os.close(handle)

    threading.Thread(target=wait, daemon=True, name="ray-watch").start()


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
