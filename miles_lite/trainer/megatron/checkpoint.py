"""A trainer's state on disk: weights and optimizer as Megatron torch_dist, random states by rank.

    FOLDER/policy/      torch_dist: weights, optimizer, number of updates; any layout reads it
    FOLDER/reference/   torch_dist: weights of the reference policy, where there is one
    FOLDER/random/rank_00000.pt         random states; only the same layout reads them

Import only after cpu_compat.install().
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as groups
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from miles_lite.trainer.megatron.model import unwrap
from miles_lite.trainer.megatron.optimizer import Optimizer
from miles_lite.weights.torch_dist import DistCheckpoint

# torch.load then refuses all but tensors and plain values
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# what numpy's random state is pickled as
_OF_NUMPY = [
    *(numpy._core.multiarray._reconstruct, numpy.ndarray),  # pyright: ignore
    *(numpy.dtype, numpy.dtypes.UInt32DType),
]


def save(
    folder: Path,
    ddp: torch.nn.Module,
    optimizer: Optimizer,
    reference: Sequence[torch.Tensor],
    writer: Writer,
) -> None:
    """Write this rank's part. Collective over all ranks; `folder` is there and empty. Weights and
    optimizer are there only when `writer` has finished, the reference when this returns: all that
    Megatron writes meanwhile reports to one queue, where two folders would take each other's."""
    rank = dist.get_rank()
    for name in ("policy", "random", *(["reference"] if reference else [])):
        if rank == 0:
            (folder / name).mkdir()
    dist.barrier()
    if reference:
        with _weights_of(ddp, reference):
            Writer(asynchronous=False).write({"model": _weights(ddp)}, folder / "reference")
    state = {**_policy(ddp, optimizer, loading=False), "updates": optimizer.num_updates}
    writer.write(state, folder / "policy")
    torch.save(_random_state(), folder / "random" / f"rank_{rank:05d}.pt")


def load(
    folder: Path,
    ddp: torch.nn.Module,
    optimizer: Optimizer,
    reference: Sequence[torch.Tensor],
    same_layout: bool,
) -> None:
    """Take over what any layout's ranks saved. Collective. Random states only from the same one.

    Raises ValueError if there is no optimizer state, or no reference where one is needed, or if
    what is there cannot be read.
    """
    if not (folder / "policy").is_dir():
        raise ValueError(f"{folder} has no policy/: it is no checkpoint of a trainer")
    if not any("optimizer" in key for key in DistCheckpoint(folder / "policy").shapes):
        raise ValueError(
            f"{folder} holds weights only and cannot resume the optimizer: a new run starts from "
            "them if `miles-lite convert dist-to-hf` makes them an HF folder, for model.path"
        )
    if reference:
        if not (folder / "reference").is_dir():
            raise ValueError(
                f"{folder} has no reference/: the run that saved it had algo.kl_coef and "
                "algo.kl_loss_coef = 0; a KL to another reference is another run"
            )
        with _reading(folder / "reference"):
            loaded = _load({"model": _weights(ddp)}, folder / "reference")
            unwrap(ddp).load_state_dict(loaded["model"])
        for frozen, param in zip(reference, unwrap(ddp).parameters(), strict=True):
            frozen.copy_(param.data)
    state = _policy(ddp, optimizer, loading=True)
    with _reading(folder / "policy"):
        loaded = _load(state, folder / "policy")
        unwrap(ddp).load_state_dict(loaded["model"])
        optimizer.load_state(loaded["optimizer"], int(loaded["updates"]))
    mine = folder / "random" / f"rank_{dist.get_rank():05d}.pt"
    if same_layout:
        with _reading(mine), torch.serialization.safe_globals(_OF_NUMPY):
            _set_random_state(torch.load(mine, weights_only=True))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Torch and Megatron raise whatever a damaged file makes them, torch also what is no
    Exception."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: Any = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]  # of any rank
        # torch goes on with the advice to run what is in the file
        told = re.split(r"\.\s|\n", f"{type(cause).__name__}: {cause}")[0]
        raise ValueError(
            f"{path} cannot be read ({told[:200]}): if it is damaged, remove {path.parent} to go "
            "on from an older checkpoint"
        ) from error


# ------------------------------------------------------------------ torch_dist


def _metadata() -> dict[str, Any]:
    """How Megatron is to lay out state: so that any TP, PP, EP and DP can read it."""
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": groups.get_data_parallel_group(with_context_parallel=True),
    }


def _weights(ddp: torch.nn.Module) -> dict[str, Any]:
    return unwrap(ddp).sharded_state_dict(metadata=_metadata())


def _policy(ddp: torch.nn.Module, optimizer: Optimizer, loading: bool) -> dict[str, Any]:
    weights = _weights(ddp)
    return {"model": weights, "optimizer": optimizer.state(weights, loading, _metadata())}


class Writer:
    """Writes torch_dist folders: at once, or in forked processes, which see memory as it was when
    they were forked, while this one goes on."""

    def __init__(self, asynchronous: bool) -> None:
        self._queue = AsyncCallsQueue() if asynchronous else None

    def write(self, state: dict[str, Any], folder: Path) -> None:
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), _dp_group(), True
        )
        content = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
        # megatron-core 0.17 would take another writer than its own by default
        known = inspect.signature(dist_checkpointing.save).parameters
        chosen: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in known else {}
        request = dist_checkpointing.save(
            state,
            str(folder),
            strategy,
            async_sharded_save=self._queue is not None,
            content_metadata=content,
            **chosen,
        )
        if self._queue is not None:
            assert request is not None, "megatron was asked for an asynchronous save"
            self._queue.schedule_async_request(request)

    def finish(self) -> None:
        """Collective: all is written, on all ranks, when this returns."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._queue.close()
            self._queue = None


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Megatron and torch unpickle whatever a checkpoint holds: so `.metadata` is looked at first,
    and no other file may name a function."""
    DistCheckpoint(folder)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _dp_group())
    before = os.environ.get(_WEIGHTS_ONLY, "")
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        return cast(dict[str, Any], dist_checkpointing.load(state, str(folder), strategy))
    finally:
        os.environ[_WEIGHTS_ONLY] = before


def _dp_group() -> Any:
    return groups.get_data_parallel_group(with_context_parallel=True)


@contextlib.contextmanager
def _weights_of(ddp: torch.nn.Module, reference: Sequence[torch.Tensor]) -> Iterator[None]:
    """The reference's parameters in place of the policy's, for as long as this lasts."""
    params = list(unwrap(ddp).parameters())
    policy = [param.data.to("cpu", copy=True) for param in params]
    try:
        for param, frozen in zip(params, reference, strict=True):
            param.data.copy_(frozen)
        yield
    finally:
        for param, own in zip(params, policy, strict=True):
            param.data.copy_(own)


# ------------------------------------------------------------------ random states


def _megatron_random() -> Any:
    return get_cuda_rng_tracker()


def _random_state() -> dict[str, Any]:
    state = {
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state(),
        "python": random.getstate(),
        "megatron": _megatron_random().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])
    _megatron_random().set_states(state["megatron"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
