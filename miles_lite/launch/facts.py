"""What the hosts of a run must agree on, told before anything of theirs is started."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_lite.environment import PROJECT, code_digests, gpu_names, package_versions
from miles_lite.log import few

MAX_SKEW_S = 5.0  # between clocks; leases of file systems and logs go by them


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one host, as it tells the head."""

    host: str
    address: str
    python: str
    packages: dict[str, str]
    code: dict[str, str]  # digest by file
    gpus: tuple[str, ...]
    clock: float  # seconds since 1970, when they are sent

    @classmethod
    def here(cls, address: str) -> Facts:
        return cls(
            host=socket.gethostname(),
            address=address,
            python=platform.python_version(),
            packages=package_versions(),
            code=code_digests(PROJECT),
            gpus=tuple(gpu_names()),
            clock=time.time(),
        )

    def too_few(self, num_gpus: int) -> list[str]:
        """A sentence if it has fewer than the run needs of each host."""
        if len(self.gpus) >= num_gpus:
            return []
        return [f"it has {len(self.gpus)} GPUs, where the layout wants {num_gpus} of every host"]

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})"


def differences(head: Facts, other: Facts, received: float) -> list[str]:
    """Why `other`, whose facts came at `received` by the head's clock, cannot join."""
    found = []
    if head.python != other.python:
        found.append(f"it has Python {other.python}, the head {head.python}")
    if packages := _differing(head.packages, other.packages):
        told = [
            f"{name} {other.packages.get(name, 'missing')} (head {head.packages.get(name, 'none')})"
            for name in packages
        ]
        found.append(f"other package versions: {few(told)}; install the same on all hosts")
    if files := _differing(head.code, other.code):
        found.append(f"other code than the head's: {few(files)}; bring both to one commit")
    if abs(skew := other.clock - received) > MAX_SKEW_S:
        found.append(
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the head's, "
            f"more than {MAX_SKEW_S:g} s: set it, with chrony or NTP on both"
        )
    return found


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
