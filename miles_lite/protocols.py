"""The seams: what the loop needs of a trainer, a rollout, an engine. No back-end is named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_lite.types import Batch, Completion, Group, Prompt, Request, Sample, Sampling, Verdict

if TYPE_CHECKING:  # this module stays light
    import numpy as np

Metrics = dict[str, float]
# sample -> fp32 [token of its answer]: arrays, since a step has millions of these
TokenValues = Mapping[int, "np.ndarray"]


class Phase(Enum):
    """Who holds what on the shared devices.

                trainer                              rollout
    generate    nothing                              weights, KV cache, Mamba state, graphs
    train       weights, gradients, optimizer        nothing
    sync        weights                              weights

    On a CPU the device is the host, so weights, which must survive somewhere, stay where they are;
    gradients, optimizer scratch and caches really go.
    """

    generate = "generate"
    train = "train"
    sync = "sync"


class Resident(Protocol):
    """Anything that occupies device memory."""

    def enter(self, phase: Phase) -> Mapping[str, int]:
        """Free or take memory; returns `held_bytes` when the table of `Phase` holds for this
        party."""
        ...

    def held_bytes(self) -> Mapping[str, int]:
        """Device bytes held now by kind ("weights", "grads", ...), summed over all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of one HF tensor along the dimension on which that tensor is cut."""

    tensor: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Form(Enum):
    """How a rank keeps what it hosts."""

    stored = "stored"  # as the weight table says: in the model's dtype, or in fp32
    rounded = "rounded"  # in the model's dtype, even what the table keeps in fp32
    decay = "decay"  # Mamba's A_log as its kernels want it: A = -exp(A_log), in fp32


@dataclass(frozen=True, slots=True)
class Hosted:
    """A parameter or buffer of one rank: segments of HF tensors laid end to end along `dim`."""

    param: str  # name in the rank's own model
    index: int  # position in a stacked parameter (its first dimension), or -1 for all of it
    dim: int  # of the HF tensor; counted after `index` is taken
    segments: tuple[Segment, ...]
    form: Form = Form.stored


@dataclass(frozen=True, slots=True)
class Bucket:
    """Bytes on their way from one trainer rank to one engine rank; the plan says what they are."""

    handle: Any  # where they lie: the transport's business
    num_bytes: int


class RunError(RuntimeError):
    """Ends a run. Its message is all there is to say: what failed, where, and the way out."""


class RemoteError(RunError):
    """A rank failed, died, or did not answer in time. The message names rank and operation."""


class EngineError(RunError):
    """An engine cannot answer. The message names engine and rank."""


class EnginesLost(EngineError):
    """These engines failed, or are not to be believed any more. causes: by engine, naming it."""

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__("; ".join(causes.values()))
        self.causes = causes


class Engine(Resident, Protocol):
    """One rollout engine: one or more processes that serve one copy of the policy."""

    name: str
    version: int  # of the weights it serves; -1 before the first commit
    stall_s: float  # without a step or an answer for so long, it is taken for lost

    def restart(self) -> None:
        """New processes in place of the old ones, whatever those do, by the same name. They hold
        nothing and have no weights. Raises EngineError or what starting raises."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Draw one completion. A uid is used once in a life of the processes. Raises
        EngineError."""
        ...

    def can_score(self, sampling: Sampling) -> bool:
        """Whether `generate` takes requests with an answer to score like this."""
        ...

    async def abort(self) -> None:
        """End all unfinished requests; they resolve with Finish.abort and what they have."""
        ...

    def layout(self) -> Sequence[Sequence[Hosted]]:
        """For each rank of this engine: what it hosts. All a sync needs besides the dtype."""
        ...

    def receivers(self) -> Sequence[Any]:
        """For each rank of this engine: a remote handle on its WeightReceiver."""
        ...

    def begin_sync(self, version: int) -> None:
        """Weights of `version` come: after this receivers take buckets. Raises EngineError."""
        ...

    def commit(self, version: int) -> None:
        """All weights came and were compared: serve as `version`. Raises EngineError."""
        ...


class WeightReceiver(Protocol):
    """What an engine rank can be told during a sync (through a remote handle)."""

    def set_routes(self, routes: Any) -> None:
        """Once, before the first sync: which copies will come from whom (weights.plan.Route)."""
        ...

    def load_bucket(self, source: int, number: int, bucket: Bucket) -> None:
        """Copy bucket `number` of trainer rank `source` into the live parameters."""
        ...

    def finish_sync(self) -> Mapping[int, Sequence[int]]:
        """All arrived? Returns checksums of the live weights by source rank."""
        ...


class PromptStream(Protocol):
    """Prompts in the order they are to be trained on, without end."""

    def take(self, n: int) -> list[Prompt]: ...

    def put_back(self, n: int) -> None:
        """The last `n` prompts taken come next again."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What a rollout brings: groups in the order their prompts were dealt."""

    groups: Sequence[Group]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Rescored:
    """Answers with the log-probs and routing that a prefill gives them, as different distributions.
    One is empty where an engine cannot tell, or where it would be the policy's own."""

    policy: Sequence[Completion] = ()  # log-probs as the answers' own should be
    untempered: Sequence[Completion] = ()  # at temperature 1
    truncated: Sequence[Completion] = ()  # among the tokens that top-p and top-k keep


class Rollout(Resident, Protocol):
    """Many engines, one policy, and the rewards of what it says."""

    version: int
    engines: Sequence[Engine]
    # Called when engines are lost while the others owe nothing, with the causes by name: returns
    # when all serve `version` again. None: losing an engine ends the call.
    revive: Callable[[Mapping[str, str]], None] | None

    def rescore(self, samples: Sequence[Sample]) -> Rescored:
        """The answers of `samples`, each read in one prefill instead of token by token."""
        ...

    def progress(self) -> str:
        """How far the running call is and which engines owe answers, in words; "" without one. Any
        thread may ask."""
        ...

    def generate(self, prompts: PromptStream) -> RolloutResult:
        """A step's scored groups, all of version `version`; takes as many prompts as it needs."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What training on one batch tells."""

    metrics: Metrics
    # of the trainer before the first update; samples not trained on are missing
    logprobs: TokenValues
    entropies: TokenValues  # of the same distributions


class NonFiniteError(RemoteError):
    """A loss or gradient is NaN or infinite; no weight was changed from there on. result: what was
    seen until then, the culprit among its metrics."""

    def __init__(self, message: str, result: StepResult) -> None:
        super().__init__(message)
        self.result = result


class Trainer(Resident, Protocol):
    """The optimizer of the policy; all its ranks."""

    @property
    def dp(self) -> int:
        """Data-parallel size: how many shares a batch is cut into."""
        ...

    def step(self, batch: Batch) -> StepResult:
        """Old log-probs, drift, and every update of `batch`. Weights change only here. Raises
        NonFiniteError."""
        ...

    def refresh_reference(self) -> None:
        """From now on the KL is to the policy as it is."""
        ...

    @property
    def layout(self) -> Mapping[str, int]:
        """Sizes by name, such as {"tp": 2, ...}; where they are the same, so is the arithmetic."""
        ...

    def score(self, batch: Batch) -> TokenValues:
        """Sample -> log-probs of its response as the weights are now, of the first update."""
        ...

    def save(self, folder: Path, asynchronous: bool) -> None:
        """Write all state into an empty folder; asynchronously, go on while it is written."""
        ...

    def finish_save(self) -> None:
        """All that `save` began is written when this returns."""
        ...

    def load(self, folder: Path, same_layout: bool) -> None:
        """Take over what `save` wrote, at whatever layout. Raises RemoteError naming the rank."""
        ...

    def digests(self, folder: Path, files: Sequence[str]) -> Mapping[str, str]:
        """A hash of the contents of each file in `folder`; "" if it cannot be read."""
        ...

    def send_weights(self, rollout: Rollout, version: int) -> Metrics:
        """Bring every engine rank to `version`; returns only when both sides' checksums agree.
        Raises EnginesLost, after which it can be called again."""
        ...

    def export_hf(self, folder: Path) -> None:
        """Write the policy as an HF checkpoint."""
        ...


class RewardFn(Protocol):
    """Score one answer. Runs in a killable process; may raise: that answer is then invalid.

    A parameter called `prompt` gets the rendered prompt, one called `metadata` what the data row
    says; reward.options come as further keywords. A function whose first parameter is called
    `responses` scores a whole group at once: (list[str], label) -> list of results.
    """

    def __call__(self, response: str, label: str) -> float | Verdict: ...
