"""Where the processes of a group meet."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


def open_store(host: str, port: int, is_master: bool, timeout_s: float) -> TCPStore:
    """The store at host:port; the master opens it, and port 0 lets the system choose one.

    A port chosen this way stays the store's own, unlike one that was free a moment ago. The store
    listens at `host` alone: torch would let it listen on every interface, and it believes whoever
    asks. A process that waits for the store, or for a key in it, gives up after `timeout_s`.
    """
    held: int | None = None
    if is_master:
        port, held = listener(host, port)
    return TCPStore(
        host,
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=held,
    )


def listener(host: str, port: int) -> tuple[int, int]:
    """The port, and a socket that listens there at `host` alone, for a store that will close it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as server:
        return server.getsockname()[1], server.detach()
