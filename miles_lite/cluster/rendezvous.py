"""Where the processes of a group meet."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


def open_store(host: str, port: int, is_master: bool, timeout_s: float) -> TCPStore:
    """The store at host:port; the master opens it, and port 0 lets the system choose one.

    A port chosen this way stays the store's own, unlike one that was free a moment ago. A process
    that waits for the store, or for a key in it, gives up after `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
