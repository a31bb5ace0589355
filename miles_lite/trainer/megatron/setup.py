"""Process groups of one trainer rank: torch.distributed and megatron's parallel_state."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch._C._distributed_c10d import Backend as _Backend

from miles_lite.cluster.rendezvous import TCPStore, open_store
from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron import cpu_compat

log = logging.getLogger(__name__)


def init(
    rank: int,
    address: str,
    dims: ParallelDims,
    seed: int,
    timeout_s: float,
    store: TCPStore | None = None,
) -> None:
    """Join the trainer's world as `rank` of dims.world_size; returns once all ranks have.

    `address` is "host:port" of the meeting point; `store`, if this rank opened it. A collective
    that takes longer than `timeout_s` raises. The seed is the same for all ranks; megatron derives
    those of TP, EP and PP ranks from it.
    """
    cpu_compat.install()
    if store is None:
        host, port = address.rsplit(":", 1)
        store = open_store(host, int(port), rank == 0, timeout_s)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=dims.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    init_groups(dims, seed, timeout_s)


def init_groups(dims: ParallelDims, seed: int, timeout_s: float) -> None:
    """Megatron's groups over an initialised torch.distributed, checked against `dims`."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.expert_tp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    _check_coordinates(dist.get_rank(), dims)
    model_parallel_cuda_manual_seed(seed)


NCCL_WITH_SUSPEND = (2, 29, 7)


def suspendable_groups() -> list[Any]:
    """NCCL backends whose buffers can leave the device between uses: of every group there is.

    They take gigabytes a device with as many groups as Megatron makes. Empty on a CPU, whose gloo
    holds none, and with an NCCL or torch that cannot. Not run on a GPU; should be right because
    torch's Backend.suspend is a wrapper of ncclCommSuspend for exactly this use.
    """
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return []
    if torch.cuda.nccl.version() < NCCL_WITH_SUSPEND or not hasattr(_Backend, "suspend"):
        log.warning(
            "NCCL %s keeps the buffers of all process groups on the device while engines generate; "
            "%s and later, with a torch that knows, would not",
            *(".".join(map(str, v)) for v in (torch.cuda.nccl.version(), NCCL_WITH_SUSPEND)),
        )
        return []
    groups = list(dist.distributed_c10d._world.pg_map)
    backends = [group._get_backend(torch.device("cuda")) for group in groups]
    return list({id(backend): backend for backend in backends}.values())


def destroy() -> None:
    """Leave all groups; `init` may follow, with other dimensions."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _check_coordinates(rank: int, dims: ParallelDims) -> None:
    """The weight table and the sync plan place shards by ParallelDims: megatron must agree."""
    from megatron.core import parallel_state as groups

    ours_and_theirs = {
        "tp_rank": (dims.tp_rank(rank), groups.get_tensor_model_parallel_rank()),
        "dp_rank": (dims.dp_rank(rank), groups.get_data_parallel_rank()),
        "pp_rank": (dims.pp_rank(rank), groups.get_pipeline_model_parallel_rank()),
        "ep_rank": (dims.ep_rank(rank), groups.get_expert_model_parallel_rank()),
        "expert_tp_rank": (dims.expert_tp_rank(rank), groups.get_expert_tensor_parallel_rank()),
        "dp": (dims.dp, groups.get_data_parallel_world_size()),
        "expert_dp": (dims.expert_dp, groups.get_expert_data_parallel_world_size()),
    }
    for name, (ours, theirs) in ours_and_theirs.items():
        assert ours == theirs, f"{name} of rank {rank} is {ours} in {dims}, {theirs} in megatron"
