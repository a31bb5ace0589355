"""What can be seen on one host before its part of a run is started; each finding is a sentence."""

from __future__ import annotations

import ipaddress
import sys

import psutil

from miles_lite.cluster.network import addresses
from miles_lite.launch.ports import Ports, taken

RAY = ("raylet", "gcs_server")


class LaunchError(ValueError):
    """The hosts cannot start together. Says which, why, and the way out."""


def require(problems: list[str]) -> None:
    if problems:
        raise LaunchError("\n  ".join(["this host is not ready:", *problems]))


def head_problems(address: str, num_hosts: int, ports: Ports) -> list[str]:
    found = []
    if (loopback := _ip(address).is_loopback) and num_hosts > 1:
        found.append(f"{address} is a loopback address, which no other host can reach")
    elif not loopback and address not in addresses():
        found.append(f"{address} is no address of this host, which has {own_addresses()}")
    return found + common_problems(address, ports)


def worker_problems(head: str, ports: Ports) -> list[str]:
    if _ip(head).is_loopback or head in addresses():
        return [
            f"{head} is an address of this very host: a worker is given the head's, and runs on "
            "every other host"
        ]
    return common_problems("", ports)


def exposed(address: str, is_public: bool) -> list[str]:
    """is_public: that it may be was asked for."""
    if not _ip(address).is_global or is_public:
        return []
    return [
        f"{address} is an address of the internet, and data ports of gloo, NCCL and SGLang's ranks "
        "believe whoever reaches them (Ray wants the token of the run): take the hosts' addresses "
        "in a private network, or, behind a firewall that lets only the hosts through, say --public"
    ]


def common_problems(address: str, ports: Ports) -> list[str]:
    """address: ours, as far as it is known."""
    stale = stale_ray({address} if address else set(addresses()))
    found = stale or taken(ports)  # a stale Ray holds the ports too: one sentence is enough
    if " " in sys.executable:
        found.append(f"Ray cannot start {sys.executable!r}: there is a space in the path")
    return found


def stale_ray(own: set[str]) -> list[str]:
    """Ray processes that serve one of the addresses `own`."""
    found = []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] in RAY and any(_value(word) in own for word in words):
            found.append(
                f"a Ray runs here already: {process.info['name']}, process {process.pid}; end the "
                f"run it belongs to, or it, if it was left over: kill {process.pid}"
            )
    return found


def _value(word: str) -> str:
    """10.0.0.1 of --node_ip_address=10.0.0.1."""
    return word.partition("=")[2]


def own_addresses() -> str:
    return ", ".join(f"{address} ({name})" for address, name in addresses().items()) or "none"


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise LaunchError(f"{text!r} is no IP address; this host has {own_addresses()}") from None
