"""Collectives among the ranks of one engine, apart from torch.distributed's default group.

Every member of a group calls the same operations in the same order. When a rank gives up it drops
its connections, so that its peers fail at once and do not wait for the timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from miles_lite.parallel import EngineDims
from miles_lite.rollout.embedded.options import EngineOptions


class Comm:
    """One group of ranks; with a single member every operation returns its input."""

    def __init__(self, ranks: Sequence[int], rank: int, backend: Any = None):
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(rank)
        self.backend = backend

    def sum(self, x: Tensor) -> Tensor:
        """The sum over members, added up in fp32 and bitwise the same on each of them."""
        if self.size == 1:
            return x
        total = x.float().contiguous() if x.is_floating_point() else x.contiguous()
        self.backend.allreduce([total]).wait()
        return total.to(x.dtype)

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the same-shaped tensors of all members."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        self.backend.allgather([list(out.unbind(0))], [x.contiguous()]).wait()
        return out

    def broadcast(self, data: bytes, num_bytes: int) -> bytes:
        """Bytes of member 0, of which all know the number."""
        if self.size == 1:
            return data
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.backend.broadcast(buffer, 0).wait()
        return buffer.numpy().tobytes()

    def send(self, data: bytes, member: int) -> None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.backend.send([buffer], member, 0).wait()

    def receive(self, num_bytes: int, member: int) -> bytes:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self.backend.recv([buffer], member, 0).wait()
        return buffer.numpy().tobytes()


class Comms:
    """The groups one rank belongs to."""

    control: Comm  # all ranks, tensors in host memory
    everyone: Comm  # all ranks
    attn: Comm  # the ranks that serve the same requests
    peers: Comm  # one rank of each data-parallel group: same place, other requests

    def __init__(self, dims: EngineDims, rank: int, store: Store | None, options: EngineOptions):
        """store: where the ranks meet; None for an engine of a single rank."""
        cuda = torch.device(options.device).type == "cuda"
        timeout = timedelta(seconds=options.timeout_s)
        known: dict[tuple[str, Sequence[int]], Comm] = {}

        def group(kind: str, ranks: Sequence[int]) -> Comm:
            key = (kind, tuple(ranks))
            if key not in known:
                backend = None
                if store is not None and len(ranks) > 1:
                    prefix = PrefixStore(f"{kind}/{','.join(map(str, ranks))}", store)
                    make = dist.ProcessGroupGloo if kind == "host" else _nccl
                    backend = make(prefix, tuple(ranks).index(rank), len(ranks), timeout)
                known[key] = Comm(ranks, rank, backend)
            return known[key]

        on_device = "device" if cuda else "host"
        first = dims.dp_rank(rank) * dims.attn_tp
        self.control = group("host", range(dims.tp))
        self.everyone = group(on_device, range(dims.tp))
        self.attn = group(on_device, range(first, first + dims.attn_tp))
        self.peers = group(on_device, range(dims.attn_tp_rank(rank), dims.tp, dims.attn_tp))

    def close(self) -> None:
        for comm in (self.control, self.everyone, self.attn, self.peers):
            comm.backend = None


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
