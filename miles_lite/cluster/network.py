"""Addresses, interfaces and ports of this host."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ephemeral_range() -> tuple[int, int]:
    """Ports that the system gives to nobody in particular."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = path.read_text().split() if path.is_file() else ("32768", "60999")
    return int(low), int(high)


def listening(first: int, last: int) -> dict[int, str]:
    """Who listens on which of these TCP ports."""
    return {
        entry.laddr.port: _process(entry.pid)
        for entry in psutil.net_connections("tcp")
        if entry.laddr and entry.status == psutil.CONN_LISTEN and first <= entry.laddr.port <= last
    }


def _process(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())[:80]})"
    except psutil.Error:
        return f"process {pid}"
