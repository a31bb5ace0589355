"""A connection to Ray and the devices reserved in it, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator

import ray
from ray.util.placement_group import remove_placement_group

from miles_lite.cluster import CPU_DEVICE, roll
from miles_lite.cluster.placement import Bundle, reserve
from miles_lite.cluster.watch import watched
from miles_lite.config import ClusterConfig

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_session(
    cluster: ClusterConfig,
    num_devices: int,
    device: str,
    lost: Callable[[str], None] = log.error,
) -> Iterator[list[Bundle]]:
    """Start or join Ray, reserve `num_devices` devices, give all back on leaving.

    A local Ray is sized for the run: on a CPU every rank gets a pretended device, however few cores
    there are. lost: told, when a part of it dies, before this process ends; see `watched`.
    """
    if " " in sys.executable:
        raise ValueError(
            f"Ray cannot start processes with {sys.executable!r}: there is a space in the path; "
            "move the project or its environment to a path without one"
        )
    resource = "GPU" if device == "cuda" else CPU_DEVICE
    local = cluster.address == "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=cluster.address,
            resources={CPU_DEVICE: num_devices} if local and device == "cpu" else None,
            num_cpus=max(os.cpu_count() or 1, 1) if local else None,
            include_dashboard=False if local else None,
            log_to_driver=True,
            logging_level=logging.WARNING,
            configure_logging=False,
        )
    except SystemExit:  # Ray's own answer to SIGTERM, which is better than the default only
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)
    try:
        with watched(lost):
            bundles = reserve(num_devices, resource, cluster.start_timeout_s)
            try:
                with roll.board(ray.util.get_node_ip_address()):
                    yield bundles
            finally:
                remove_placement_group(bundles[0].group)
    finally:
        ray.shutdown()
