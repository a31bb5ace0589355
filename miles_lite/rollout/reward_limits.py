"""What a reward worker may not do, whatever an answer makes its reward function do.

The kernel holds it to these for good, and all that it starts. It is no sandbox: a worker reads and
writes the files of its user. What runs answers as programs needs a container around it.
"""

from __future__ import annotations

import ctypes
import math
import platform
import resource
import struct
import sys
from pathlib import Path

FILE_BYTES = 8 << 30  # of one file; appending to a log of the run counts from the log's begin

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the kernel's packet filters
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # EACCES
# by machine: what the kernel calls it, socket()
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_IO_URING = 425  # io_uring_setup on all machines: it can make sockets too
_X32 = 0x40000000  # the same calls under other numbers


def refuse_network() -> str:
    """From now on this process and what it starts can make no socket, be it for the internet or for
    a service of this host. The kernel sees to it; where it cannot, Python does, which compiled code
    can go around. Returns why, or ""."""
    if why := _filter_calls():
        sys.addaudithook(_no_sockets)
    return why


def _filter_calls() -> str:
    """Why the kernel cannot; "" if it does."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"unknown calls of {sys.platform} on {platform.machine()}"
    machine, socket_call = _MACHINES[platform.machine()]
    program = [  # operation, skip if so, skip if not, operand
        (_LOAD, 0, 0, 4),  # the machine that a call is meant for
        (_EQUAL, 0, 4, machine),
        (_LOAD, 0, 0, 0),  # number of the call
        (_EQUAL, 2, 0, socket_call),
        (_EQUAL, 1, 0, _IO_URING),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    if prctl(_NO_NEW_PRIVILEGES, 1, None, 0, 0) or prctl(_SET_SECCOMP, _FILTER, header, 0, 0):
        return f"the kernel has no seccomp filters for us (errno {ctypes.get_errno()})"
    return ""


def _no_sockets(event: str, _: tuple[object, ...]) -> None:
    if event in ("socket.__new__", "socket.connect", "socket.bind"):
        raise PermissionError("a reward worker has no network: see NETWORK in docs/rewards.md")


def limit_memory(num_bytes: int) -> None:
    """And the size of files. Also lets the kernel, short of memory, take workers before it takes
    ranks of the run."""
    if num_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_least(FILE_BYTES, most), most))
    Path("/proc/self/oom_score_adj").write_text("1000")


def limit_cpu(seconds: float) -> None:
    """Of this process from now on, and of each that it starts: it ends also where nobody is left to
    kill it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (_least(limit, most), most))


def _least(wanted: int, most: int) -> int:
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)
