"""What crosses between the trainer group and its workers. Imports no megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles_lite.config import AlgoConfig, OptimConfig, TrainConfig
from miles_lite.metrics import Partial
from miles_lite.parallel import ParallelDims
from miles_lite.protocols import TokenValues


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a rank needs to know of the run."""

    model_path: Path
    dtype: str  # "fp32" or "bf16"
    device: str  # "cpu" or "cuda"
    dims: ParallelDims
    train: TrainConfig
    optim: OptimConfig
    algo: AlgoConfig
    temperature: float  # of the rollout: log-probs on both sides are of logits / temperature
    sync_timeout_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank saw of a step. Only ranks that compute losses fill it."""

    partials: dict[str, Partial]
    logprobs: TokenValues  # before the first update
    entropies: TokenValues  # of the same distributions
    broken: str = ""  # what was not finite, so that no weight was changed from there on
