"""Every knob, as frozen dataclasses with checks; `compose` makes a Config from YAML, once.

A section checks what it alone can know; `planner.rules` checks what needs the model or two
sections. Derived values are properties. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from miles_lite.alarm_config import AlarmConfig
from miles_lite.bounds import ConfigError, above_0, below_1, derive_batch, not_negative, positive
from miles_lite.data_config import DataConfig
from miles_lite.data_config import SourceConfig as SourceConfig  # part of what a config is
from miles_lite.parallel import EngineDims, ParallelDims


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: Path  # folder of the HF checkpoint: weights, config, tokenizer
    plan_path: Path | None = None  # whose config.json `plan` reads while `path` is not there
    dtype: Literal["fp32", "bf16"] = "bf16"  # of weights and activations on both sides


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Trainer layout: tp x pp x dp ranks, one a device."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1  # experts are spread over this many ranks
    expert_tp: int = 1  # tensor-parallel size of one expert

    def __post_init__(self) -> None:
        positive(self, "tp", "pp", "dp", "ep", "expert_tp")

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.tp, self.pp, self.dp, self.ep, self.expert_tp)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Adam with decoupled weight decay."""

    lr: float = 1e-6
    warmup_updates: int = 0  # linear from 0; constant after
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0  # global norm; 0 turns it off
    cpu_offload: bool = False  # optimizer state and step on the host

    def __post_init__(self) -> None:
        not_negative(self, "lr", "warmup_updates", "weight_decay", "clip_grad")
        above_0(self, "eps")
        below_1(self, "beta1", "beta2")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionConfig:
    """What is done about engine and trainer giving a token different probabilities.

    The ratio is trainer / engine before the first update, of a token, of a whole sequence (the
    product over its tokens) or their geometric mean. TIS: weight=token; icepop: outside=mask.
    """

    weight: Literal["none", "token", "sequence", "geometric"] = "none"  # multiplies the loss
    low: float = 0.0  # the weight's range
    high: float = 2.0
    outside: Literal["clip", "mask"] = "clip"  # beyond it: keep the bound, or no loss at all
    reject: Literal["none", "token", "sequence", "geometric"] = "none"  # only masks, by its range
    reject_low: float = 0.5
    reject_high: float = 2.0
    veto: float = 0.0  # a sequence holding a token of a lower ratio has no loss; 0 turns it off

    def __post_init__(self) -> None:
        for low, high in (("low", "high"), ("reject_low", "reject_high")):
            if not 0 <= getattr(self, low) <= 1 <= getattr(self, high):
                raise ConfigError(
                    f"{low} = {getattr(self, low)} and {high} = {getattr(self, high)}: wanted "
                    f"0 <= {low} <= 1 <= {high}, equal policies have ratio 1"
                )
        if not 0 <= self.veto < 1:
            raise ConfigError(
                f"veto = {self.veto}: wanted 0 for off, or a small ratio such as 1e-4"
            )

    @property
    def active(self) -> bool:
        return self.weight != "none" or self.reject != "none" or self.veto > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgoConfig:
    """From rewards to the loss. configs/algo has the published settings, docs/algorithms.md the
    formulas."""

    advantage_estimator: Literal[
        "grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
    ] = "grpo"
    normalize_std: bool = True  # grpo: divide by the deviation of the group's rewards (ddof 1)
    whiten: bool = False  # advantages of all trained tokens of a step to mean 0 and variance 1
    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    old_logprobs: Literal["trainer", "rollout"] = "trainer"  # whose the ratio starts from
    aggregation: Literal["sample", "token", "constant"] = "sample"  # what weighs the same
    aggregation_constant: float = 0.0  # divisor of a sample's sum; 0: rollout.max_response_tokens
    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    eps_clip_c: float = 0.0  # dual clip for negative advantages, > 1; 0 turns it off
    opsm_delta: float = 0.0  # mask samples of A < 0 that moved more than this, in nats; 0: off
    kl_coef: float = 0.0  # KL to the reference taken from the reward
    kl_loss_coef: float = 0.0  # or added to the loss; with both 0 no reference is kept
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"  # of either KL
    use_unbiased_kl: bool = False  # the KL in the loss times current / old probability
    ref_update_interval: int = 0  # steps after which the reference becomes the policy; 0: never
    entropy_coef: float = 0.0  # bonus; with 0 the entropy is only observed
    overlong_buffer: int = 0  # DAPO: the last so many tokens of an answer cost up to ...
    overlong_penalty: float = 1.0  # ... this much reward
    overlong_filter: bool = False  # answers cut at the length limit carry no loss
    train_zero_advantage: bool = True  # False spares them both passes; gradients stay the same
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    routing_replay: bool = False  # the trainer's tokens go to the experts the engine chose (R3)

    def __post_init__(self) -> None:
        below = self.eps_clip < 1 or self.policy_loss == "cispo"  # CISPO may leave it open
        if not (self.eps_clip > 0 and below) or self.eps_clip_high <= 0:
            raise ConfigError(
                f"eps_clip = {self.eps_clip} and eps_clip_high = {self.eps_clip_high}: wanted "
                "0 < eps_clip < 1 and eps_clip_high > 0"
            )
        if self.eps_clip_c != 0 and self.eps_clip_c <= 1:
            raise ConfigError(f"eps_clip_c = {self.eps_clip_c}: dual clip wants > 1, or 0 for off")
        if self.eps_clip_c and self.policy_loss == "cispo":
            raise ConfigError(
                f"eps_clip_c = {self.eps_clip_c} with policy_loss = cispo, whose weight is bounded "
                "by eps_clip_high already: leave it 0"
            )
        not_negative(self, "opsm_delta", "overlong_buffer", "overlong_penalty")
        not_negative(self, "aggregation_constant", "ref_update_interval")
        not_negative(self, "kl_coef", "kl_loss_coef")  # or the policy is paid for running away
        if not math.isfinite(self.entropy_coef):
            raise ConfigError(f"entropy_coef = {self.entropy_coef}: wanted a finite number")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0 or self.kl_loss_coef != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    num_steps: int  # rollouts, each trained once
    global_batch: int = 0  # samples of one optimizer update
    updates_per_step: int = 0  # num_prompts x samples_per_prompt = global_batch x this
    max_tokens_per_micro_batch: int = 8192  # of one forward pass; no pass ever has more
    logprob_chunk_tokens: int = 1024  # fp32 logits exist for this many tokens at a time
    timeout_s: float = 1800.0  # of one collective or one phase
    megatron: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields

    def __post_init__(self) -> None:
        positive(self, "num_steps", "max_tokens_per_micro_batch", "logprob_chunk_tokens")
        above_0(self, "timeout_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Rollout engines: num_engines x tp processes on the trainer's devices."""

    backend: Literal["embedded", "sglang"] = "embedded"
    num_engines: int = 1
    tp: int = 1  # processes of one engine
    dp: int = 1  # DP attention: groups that share the experts; tp / dp ranks cut one request
    ep: int = 1  # experts are spread over this many ranks of the engine
    max_running: int = 64  # requests at once in one DP group: sizes the caches
    prefill_tokens: int = 8192  # prompt tokens of one prefill batch
    stall_s: float = 60.0  # longer than any step takes: without one for so long it is restarted
    sglang: dict[str, Any] = field(default_factory=dict)  # further ServerArgs fields of SGLang
    python: str = ""  # interpreter that has sglang; "": the one of the run

    def __post_init__(self) -> None:
        for name in ("sglang", "python"):
            if getattr(self, name) and self.backend != "sglang":
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} with backend = {self.backend}: it would not "
                    "be used; set backend = sglang, or leave it out"
                )
        positive(self, "num_engines", "tp", "dp", "ep", "max_running", "prefill_tokens", "stall_s")
        for name in ("dp", "ep"):
            if self.tp % getattr(self, name):
                raise ConfigError(
                    f"{name} = {getattr(self, name)} does not divide tp = {self.tp}, "
                    "the number of processes of one engine"
                )

    @property
    def dims(self) -> EngineDims:
        return EngineDims(self.tp, self.dp, self.ep)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    # num_prompts x samples_per_prompt = train.global_batch x train.updates_per_step: of these four
    # one may stay 0 and is derived
    num_prompts: int = 0  # a step
    samples_per_prompt: int = 0
    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    dynamic_sampling: bool = False  # DAPO: replace groups whose rewards are all equal
    over_sampling: int = 0  # prompts asked at once for that, >= num_prompts; 0: num_prompts
    timeout_s: float = 1800.0  # of the whole generate phase
    drift_samples: int = 4  # a step, whose drift is split into parts; 0 leaves it whole
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        positive(self, "max_response_tokens")
        not_negative(self, "drift_samples")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"top_p = {self.top_p}, top_k = {self.top_k}: wanted 0 < top_p <= 1 and top_k >= 0"
            )
        above_0(self, "temperature", "timeout_s")  # training needs samples

    @property
    def num_samples(self) -> int:
        return self.num_prompts * self.samples_per_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFunction:
    file: Path  # Python file that has it
    function: str  # (response: str, label: str) -> float; see protocols.RewardFn
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    file: Path  # the run's own reward: file, function, options as in RewardFunction
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, RewardFunction] = field(default_factory=dict)  # for rows that name them
    workers: int = 2
    timeout_s: float = 10.0  # of one grade; then the worker is killed and the answer invalid
    memory_mb: int = 2048  # of one worker
    max_chars: int = 200_000  # longer answers are invalid, not graded
    cache_len: int = 65_536  # verdicts remembered; 0 for a reward that may change its mind
    invalid: Literal["wrong", "drop", "resample"] = "drop"  # what becomes of such an answer
    max_dead_steps: int = 5  # steps in a row without any advantage, then the run stops; 0: never

    def __post_init__(self) -> None:
        positive(self, "workers", "memory_mb", "max_chars")
        not_negative(self, "cache_len", "max_dead_steps")
        above_0(self, "timeout_s")

    @property
    def functions(self) -> dict[str, RewardFunction]:
        """By the name that prompts use; "" is the run's own."""
        own = RewardFunction(file=self.file, function=self.function, options=self.options)
        return {"": own, **self.others}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSetConfig:
    """What one set of data.eval has of its own; null: as in `eval`."""

    temperature: float | None = None
    top_p: float | None = None
    samples_per_prompt: int | None = None
    max_response_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    every: int = 0  # steps between evaluations; 0: only before and after, if data.eval is set
    temperature: float = 0.0
    top_p: float = 1.0
    samples_per_prompt: int = 1  # n: pass@k is told for k = 1, 2, 4, ... n
    max_response_tokens: int = 0  # 0: as in training
    pass_reward: float = 1.0  # an answer passes with this reward, or more
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)  # by name in data.eval

    def __post_init__(self) -> None:
        positive(self, "samples_per_prompt")
        not_negative(self, "every", "temperature", "max_response_tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: wanted 0 < top_p <= 1")
        for name in self.sets:
            try:
                self.of(name)
            except ConfigError as error:
                raise ConfigError(f"sets.{name}: {error}") from None

    def of(self, name: str) -> EvalConfig:
        """What holds for a set."""
        own = self.sets.get(name, EvalSetConfig())
        changes = {f.name: getattr(own, f.name) for f in fields(own)}
        return replace(self, sets={}, **{k: v for k, v in changes.items() if v is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncConfig:
    bucket_bytes: int = 256 << 20  # two of them per trainer rank hold weights on their way
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        positive(self, "bucket_bytes")
        above_0(self, "timeout_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of a run is saved, besides on SIGTERM, SIGINT and `touch RUN/save_now`."""

    every: int = 25  # steps; 0: not by steps
    minutes: float = 0.0  # since the last one, at the next end of a step; 0: not by time
    keep: int = 2  # the newest so many stay
    keep_every: int = 0  # and those of every so many steps; 0: no others
    asynchronous: bool = False  # trainers write in the background, until the end of the next step

    def __post_init__(self) -> None:
        positive(self, "keep")
        not_negative(self, "every", "minutes", "keep_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: str = "local"  # "local" starts a Ray of its own; else the address of a running one
    start_timeout_s: float = 300.0  # until every rank is up
    threads_per_rank: int = 1  # of CPU maths in one process
    hardware: str = "h200"  # configs/hardware/NAME.yaml: what `plan` takes devices and hosts for

    def __post_init__(self) -> None:
        above_0(self, "start_timeout_s")
        positive(self, "threads_per_rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    folder: Path = Path("runs")
    name: str = ""  # of the run, which goes on where it stopped; "" starts a new one every time
    wandb_project: str = ""  # "" for no W&B
    samples: bool = True  # keep every sample of every step

    def __post_init__(self) -> None:
        if self.name in (".", "..") or "/" in self.name or not self.name.isprintable():
            raise ConfigError(
                f"name = {self.name!r}: wanted the name of one folder; log.folder says where it is"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    experiment: str
    seed: int = 0
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    train: TrainConfig
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        derive_batch(self)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}: wanted 0 to 2^63 - 1")
        for name in self.eval.sets:
            if name not in self.data.eval:
                known = ", ".join(self.data.eval) or "none"
                raise ConfigError(f"eval.sets.{name}: data.eval has no such set, but {known}")

    @property
    def max_seq_len(self) -> int:
        """Tokens of prompt and answer together that an engine must have room for."""
        held_out = [self.eval.of(name).max_response_tokens for name in self.data.eval]
        answer = max(self.rollout.max_response_tokens, *held_out, 0)
        return self.data.max_prompt_tokens + answer
