"""A connection to Ray and the devices reserved in it, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.util.placement_group import remove_placement_group

from miles_lite.cluster import CPU_DEVICE, roll
from miles_lite.cluster.everywhere import refuse_dead
from miles_lite.cluster.network import interface_env
from miles_lite.cluster.placement import Bundle, reserve
from miles_lite.cluster.token import TOKEN, token_env, write_token
from miles_lite.cluster.watch import watched
from miles_lite.config import ClusterConfig
from miles_lite.protocols import RunError

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
    with contextlib.ExitStack() as stack:
        if local:
            stack.enter_context(_kept_to_ourselves())
        elif os.environ.get("RAY_AUTH_MODE") != "token":
            log.warning(
                "the Ray at %s is asked without a token: if it wants none, it runs the code of "
                "whoever reaches it; SECURITY.md says more",
                cluster.address,
            )
        _start(cluster, num_devices if local and device == "cpu" else 0)
        stack.callback(ray.shutdown)
        stack.enter_context(watched(lost))
        bundles = reserve(num_devices, resource, cluster.start_timeout_s)
        stack.callback(remove_placement_group, bundles[0].group)
        stack.enter_context(roll.board(ray.util.get_node_ip_address()))
        yield bundles


def _start(cluster: ClusterConfig, num_pretended: int) -> None:
    """num_pretended: devices of a CPU; 0 where Ray finds devices itself, or was started before."""
    local = cluster.address == "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if not local:
            refuse_dead(cluster.address)
        ray.init(
            address=cluster.address,
            resources={CPU_DEVICE: num_pretended} if num_pretended else None,
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
    except ValueError:
        raise
    except Exception as error:  # Ray's are of many kinds, plain ones among them
        raise RunError(f"Ray did not come up ({cluster.address}): {error}") from error
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _kept_to_ourselves() -> Iterator[None]:
    """A Ray started meanwhile listens on loopback, and only to who knows a token of its own.

    Ray would listen on every interface, with one token for all runs in a file that anybody on the
    machine may read. It takes loopback for this host's address where it knows that there can be no
    other host, as on a Mac; asked for 127.0.0.1 outright it takes another.
    """
    ours = interface_env("127.0.0.1")  # gloo's
    before = {name: os.environ.get(name) for name in (*TOKEN, *ours)}
    multi_host = ray_constants.ENABLE_RAY_CLUSTER
    with tempfile.TemporaryDirectory(prefix="miles-lite-") as folder:  # of mode 0700
        token = Path(folder) / "token"
        write_token(token)
        try:
            ray_constants.ENABLE_RAY_CLUSTER = False
            _set_env(ours | dict.fromkeys(TOKEN) | token_env(token))
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = multi_host
            _set_env(before)


def _set_env(values: Mapping[str, str | None]) -> None:
    """Of this process, whose Ray remembers what it read there first."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    inner: Any = sys.modules["ray._raylet"]  # compiled: nothing is known of its contents
    inner.Config.initialize("")
    inner.AuthenticationTokenLoader.instance().reset_cache()
