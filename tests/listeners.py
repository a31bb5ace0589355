"""Where a process listens, seen from outside."""

from __future__ import annotations

import psutil

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    try:
        found = process.net_connections("inet")
    except psutil.Error:  # just ended
        return set()
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def of_family(pid: int) -> set[tuple[str, int]]:
    """Of a process and all below it."""
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    return {entry for process in family for entry in listeners(process)}
