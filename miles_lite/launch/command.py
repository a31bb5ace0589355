"""`miles-lite launch head|worker IP`: a run on many hosts."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from miles_lite.launch import worker
from miles_lite.launch.head import Head, Settings
from miles_lite.launch.ports import DEFAULT_BASE, Ports
from miles_lite.supervise import DEFAULT_RESTARTS

WAIT_S = 900.0


def run(words: Sequence[str]) -> int:
    """The exit status. Raises LaunchError (a ValueError) for what the user can mend."""
    parser = argparse.ArgumentParser(prog="miles-lite launch", description=__doc__)
    parser.add_argument("role", choices=("head", "worker"))
    parser.add_argument("address", metavar="IP", help="of the head, in both roles")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the head: experiment=NAME and others"
    )
    parser.add_argument(
        "--nodes", type=int, default=0, help="hosts; 0 for as many as the layout fills"
    )
    parser.add_argument("--hosts", default="", help="their addresses, head and all: 10.0.0.1,...")
    parser.add_argument("--port", type=int, default=DEFAULT_BASE, help="first of a block of 1010")
    parser.add_argument("--wait", type=float, default=WAIT_S, help="seconds for the other side")
    parser.add_argument("--own", default="", metavar="IP", help="which of a worker's addresses")
    parser.add_argument("--public", action="store_true", help="the head's may be of the internet")
    parser.add_argument(
        "--restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help="of a driver that ends by accident while all hosts are there, at most so many in a "
        "row without a further step",
    )
    options = parser.parse_intermixed_args(words)
    settings = Settings(
        address=options.address,
        ports=Ports.of(options.port),
        wait_s=options.wait,
        num_hosts=options.nodes,
        hosts=tuple(options.hosts.replace(",", " ").split()),
        is_public=options.public,
        restarts=options.restarts,
    )
    try:
        if options.role == "head":
            return asyncio.run(Head(settings, options.overrides).run())
        if options.overrides:
            parser.error(f"a worker takes no overrides, the head does: {options.overrides}")
        return asyncio.run(worker.run(settings, options.own))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
