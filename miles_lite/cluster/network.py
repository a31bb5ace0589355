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


def open_ray() -> dict[str, bool]:
    """Directories (GCS) and dashboards of Ray that run for whoever can reach this host, since they
    want no token: who and where, and whether that is an address of the internet."""
    found: dict[str, bool] = {}
    for entry in psutil.net_connections("tcp"):
        if not (entry.laddr and entry.pid and entry.status == psutil.CONN_LISTEN):
            continue
        where = ipaddress.ip_address(entry.laddr.ip.removeprefix("::ffff:"))
        if not where.is_loopback and _runs_for_anybody(entry.pid):
            reached = addresses() if where.is_unspecified else [str(where)]
            told = f"{_process(entry.pid)} at {where}:{entry.laddr.port}"
            found[told] = any(ipaddress.ip_address(each).is_global for each in reached)
    return found


def _runs_for_anybody(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        words = " ".join(process.cmdline()[:3])
        what = "gcs_server" in words or "ray/dashboard/dashboard.py" in words
        return what and process.environ().get("RAY_AUTH_MODE") != "token"
    except psutil.Error:  # it has just ended, or is another user's
        return False


def _process(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())[:80]})"
    except psutil.Error:
        return f"process {pid}"
