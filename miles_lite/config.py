"""Every knob, as frozen dataclasses with checks. hydra composes YAML, `Config` comes out once.

A section checks what it alone can know; `planner.rules` checks what needs the model or two
sections. Derived values are properties. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from miles_lite.parallel import EngineDims, ParallelDims

T = TypeVar("T")


class ConfigError(ValueError):
    """The configuration cannot run. Says which key, which value, and the way out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: Path  # folder of the HF checkpoint: weights, config, tokenizer
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
        _positive(self, "tp", "pp", "dp", "ep", "expert_tp")

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
        if self.lr < 0:
            raise ConfigError(f"lr = {self.lr} is negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgoConfig:
    """GRPO and its loss."""

    normalize_std: bool = True  # divide group-relative rewards by the group's deviation (ddof 1)
    aggregation: Literal["sample", "token"] = "sample"  # what weighs the same: a sample or a token
    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    eps_clip_c: float = 0.0  # dual clip for negative advantages, > 1; 0 turns it off
    kl_loss_coef: float = 0.0  # 0: no frozen reference is kept
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.eps_clip < 1 or self.eps_clip_high < self.eps_clip:
            raise ConfigError(
                f"eps_clip = {self.eps_clip} and eps_clip_high = {self.eps_clip_high}: wanted "
                "0 < eps_clip < 1 and eps_clip <= eps_clip_high"
            )
        if self.eps_clip_c != 0 and self.eps_clip_c <= 1:
            raise ConfigError(f"eps_clip_c = {self.eps_clip_c}: dual clip wants > 1, or 0 for off")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    num_steps: int  # rollouts, each trained once
    global_batch: int  # samples of one optimizer update
    max_tokens_per_micro_batch: int = 8192  # token budget of one forward pass
    max_sequence_tokens: int = 16384  # a sequence over the budget runs alone, up to this hard cap
    logprob_chunk_tokens: int = 1024  # fp32 logits exist for this many tokens at a time
    timeout_s: float = 1800.0  # of one collective or one phase
    megatron: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields

    def __post_init__(self) -> None:
        _positive(
            self,
            "num_steps",
            "global_batch",
            "max_tokens_per_micro_batch",
            "max_sequence_tokens",
            "logprob_chunk_tokens",
        )
        if self.max_sequence_tokens < self.max_tokens_per_micro_batch:
            raise ConfigError(
                f"max_sequence_tokens = {self.max_sequence_tokens} is below "
                f"max_tokens_per_micro_batch = {self.max_tokens_per_micro_batch}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    train: str  # jsonl or parquet file, optionally with rows: path@[0:100]
    eval: str = ""  # held-out prompts; "" for none
    prompt_key: str = "prompt"  # chat messages or text
    label_key: str = "label"
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. enable_thinking: true
    max_prompt_tokens: int = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Rollout engines: num_engines x tp processes on the trainer's devices."""

    backend: Literal["embedded"] = "embedded"
    num_engines: int = 1
    tp: int = 1  # processes of one engine
    dp: int = 1  # DP attention: groups that share the experts; tp / dp ranks cut one request
    ep: int = 1  # experts are spread over this many ranks of the engine
    max_running: int = 64  # requests at once in one DP group: sizes the caches
    prefill_tokens: int = 8192  # prompt tokens of one prefill batch

    def __post_init__(self) -> None:
        _positive(self, "num_engines", "tp", "dp", "ep", "max_running", "prefill_tokens")
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
    num_prompts: int  # a step
    samples_per_prompt: int
    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    timeout_s: float = 1800.0  # of the whole generate phase
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _positive(self, "num_prompts", "samples_per_prompt", "max_response_tokens")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"top_p = {self.top_p}, top_k = {self.top_k}: wanted 0 < top_p <= 1 and top_k >= 0"
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature = {self.temperature}: training needs samples, so temperature > 0"
            )

    @property
    def num_samples(self) -> int:
        return self.num_prompts * self.samples_per_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    file: Path  # Python file with the reward function
    function: str  # (response: str, label: str) -> float
    workers: int = 2
    timeout_s: float = 10.0  # of one grade; then the worker is killed and the answer invalid
    memory_mb: int = 2048  # of one worker
    max_chars: int = 200_000  # longer answers are invalid, not graded


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    every: int = 0  # steps between evaluations; 0: only before and after, if data.eval is set
    temperature: float = 0.0
    samples_per_prompt: int = 1
    max_response_tokens: int = 0  # 0: as in training


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncConfig:
    bucket_bytes: int = 256 << 20  # two of them per trainer rank hold weights on their way
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: str = "local"  # "local" starts a Ray of its own; else the address of a running one
    start_timeout_s: float = 300.0  # until every rank is up
    threads_per_rank: int = 1  # of CPU maths in one process


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    folder: Path = Path("runs")
    name: str = ""  # of the run; "" makes one from experiment and time
    wandb_project: str = ""  # "" for no W&B
    samples: bool = True  # keep every sample of every step


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ------------------------------------------------------------------ YAML -> Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str]) -> Config:
    """The configuration of `experiment=NAME [key=value ...]`. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    chosen = [o.split("=", 1)[1] for o in overrides if o.startswith("experiment=")]
    if len(chosen) != 1 or chosen[0] not in names:
        raise ConfigError(
            f"say which experiment: experiment=NAME, with NAME one of {', '.join(names)}"
            + (f"; not {chosen[0]!r}{_nearest(chosen[0], names)}" if chosen else "")
        )
    overrides = [_checked_override(override) for override in overrides]
    ConfigStore.instance().store(name="knobs", node=_defaults(Config))
    # in YAML, ${project:}/... names a file of this project wherever the user stands
    OmegaConf.register_new_resolver("project", lambda: str(CONFIGS.parent), replace=True)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra_compose("train", overrides)
        raw = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip()) from None
    assert isinstance(raw, dict)
    named = {str(key): value for key, value in raw.items()}
    return build(Config, named | {"experiment": chosen[0]}, "")


def build(cls: type[T], raw: Mapping[str, Any], path: str) -> T:
    """A frozen dataclass from plain values; unknown, missing or ill-typed keys are ConfigErrors."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {path}{key}{_nearest(key, list(known))}")
    values = {}
    for name, entry in known.items():
        value = raw.get(name, "???")
        if isinstance(value, str) and value == "???":
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{path}{name} has no value: set {path}{name}=...")
            continue
        values[name] = _convert(value, hints[name], path + name)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path.rstrip('.') or 'config'}: {error}") from None


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as type `hint`, or a ConfigError naming the key."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} = {value!r} is not a section of keys")
        return build(hint, value, path + ".")  # pyright: ignore[reportArgumentType]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            near = _nearest(str(value), [str(a) for a in args])
            raise ConfigError(f"{path} = {value!r} is not one of {', '.join(map(str, args))}{near}")
        return value
    if origin in (Union, UnionType):
        return None if value is None else _convert(value, args[0], path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} = {value!r} is not a mapping")
        return dict(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} = {value!r} is {type(value).__name__}, wanted {hint.__name__}")


def _defaults(cls: Any) -> dict[str, Any]:
    """All knobs of a dataclass with their defaults, "???" where there is none, for hydra."""
    node: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for entry in fields(cls):
        hint = hints[entry.name]
        if is_dataclass(hint):
            node[entry.name] = _defaults(hint)
        elif entry.default is not MISSING:
            default = entry.default
            node[entry.name] = str(default) if isinstance(default, Path) else default
        elif entry.default_factory is not MISSING:
            node[entry.name] = entry.default_factory()
        else:
            node[entry.name] = "???"
    return node


def _checked_override(override: str) -> str:
    """Refuse a mistyped key with the nearest name (hydra's own message names none)."""
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no '=': write key=value")
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    if key in groups:
        return override
    cls: Any = Config
    parts = key.lstrip("+~").split(".")
    for depth, part in enumerate(parts):
        names = [f.name for f in fields(cls)]
        if part not in names:
            where = ".".join([*parts[:depth], ""])
            raise ConfigError(f"unknown key {key}{_nearest_key(part, where, names)}")
        hint = get_type_hints(cls)[part]
        if get_origin(hint) is dict:
            return "++" + override.lstrip("+")  # an open map: its keys are new by nature
        if not is_dataclass(hint):
            break
        cls = hint
    return override


def _nearest_key(part: str, where: str, names: Sequence[str]) -> str:
    """A name of the same section, else the full name of a key spelt alike anywhere."""
    if near := difflib.get_close_matches(part, names, n=1, cutoff=0.5):
        return f"; did you mean {where}{near[0]}?"
    known = {key.rsplit(".", 1)[-1]: key for key in _all_keys(Config)}
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _all_keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys += _all_keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return keys


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted at least 1")
