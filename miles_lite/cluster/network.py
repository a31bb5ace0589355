"""Which addresses this host has, and on which interfaces."""

from __future__ import annotations

import socket

import psutil


def addresses() -> dict[str, str]:
    """Interface by IP address, the loopback's left out."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
        and not entry.address.startswith(("127.", "::1", "fe80"))
    }


def interface_of(host: str) -> str:
    """The interface of this host that has the address `host`; "" if none has."""
    return addresses().get(host, "lo" if host.startswith("127.") else "")


def interface_env(host: str) -> dict[str, str]:
    """For processes that meet those of other hosts: gloo would ask the name service which address
    is its own, NCCL take the first interface it finds."""
    name = interface_of(host)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}
