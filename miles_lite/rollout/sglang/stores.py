"""torch's stores, in SGLang's processes: they listen where they are told to, and nowhere else.

A TCPStore listens on every interface, whatever host it is given, and believes whoever asks: its
contents are where the ranks of an engine find each other.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import distributed

from miles_lite.cluster.rendezvous import TCPStore, listener


class HomeStore(TCPStore):
    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        **named: Any,
    ) -> None:
        if is_master:
            port, named["master_listen_fd"] = listener(host_name, port)
        super().__init__(host_name, port, world_size, is_master, **named)


def install() -> None:
    """For every store that this process makes from now on."""
    modules: list[Any] = [distributed, sys.modules["torch.distributed.rendezvous"]]
    for module in modules:  # the second's name is a function's, too
        module.TCPStore = HomeStore
