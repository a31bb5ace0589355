"""Composition root: from a checked configuration to living objects. The only place that knows which
class stands behind a name; back-ends are imported when they are chosen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from miles_lite.algo.credit import CreditSettings
from miles_lite.algo.packing import PackSettings
from miles_lite.algo.routing import RouterSizes
from miles_lite.cluster import session
from miles_lite.cluster.actor import Remote, spawn
from miles_lite.cluster.placement import Bundle, check_groups, groups_of_neighbours
from miles_lite.config import Config, ConfigError, RewardConfig
from miles_lite.data.prompts import PromptSource
from miles_lite.data.source import RenderSettings, Source, open_source
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.models.flops import train_flops
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules
from miles_lite.planner.plan import Expected
from miles_lite.protocols import Engine, Phase
from miles_lite.rollout.evaluate import EvalSet
from miles_lite.rollout.manager import RolloutManager, RolloutSettings, derive_seed
from miles_lite.rollout.probes import CLOSE, Kind
from miles_lite.rollout.reward_audit import PROMPTS_PER_SOURCE, Section, audit
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.trainer.group import TrainerGroup
from miles_lite.types import Prompt, Sampling

log = logging.getLogger(__name__)

PROBED_PROMPTS = 4  # of each source, whether the reward can be won, before every run
TRAINER_SHARE, ENGINE_SHARE = 0.4, 0.2  # of a device, for Ray's book-keeping only


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works with."""

    trainer: TrainerGroup
    rollout: RolloutManager
    prompts: PromptSource
    eval_sets: Sequence[EvalSet]
    credit: CreditSettings
    packing: PackSettings
    num_probes: int  # samples of a step whose drift is split into parts
    expected: Expected


@dataclass(frozen=True, slots=True)
class Inputs:
    """What can be read and checked before any process starts."""

    model: NemotronH
    tokenizer: ChatTokenizer
    sources: Sequence[Source]  # of training prompts
    eval_prompts: Mapping[str, Sequence[Prompt]]  # by set
    sampling: Sampling


def check(cfg: Config) -> Inputs:
    """Read model, tokenizer and data, and refuse all that cannot run. Starts nothing that lasts."""
    from miles_lite.weights.conversion import check_tensors
    from miles_lite.weights.hf_files import HfFiles

    inputs = read(cfg)
    check_tensors(HfFiles(cfg.model.path), inputs.model)  # before anything of that size is made
    _check_reward(cfg, inputs)
    for warning in rules.warnings(cfg):
        log.warning(warning)
    return inputs


def read(cfg: Config) -> Inputs:
    """The same, without asking the reward whether it can be won."""
    model = NemotronH.from_folder(cfg.model.path)
    rules.check(cfg, model)
    if cfg.train.megatron or cfg.algo.routing_replay:
        _check_megatron_fields(cfg, model)
    if cfg.rollout.engine.backend == "sglang":
        _check_sglang_options(cfg)
    if not model.eos_token_ids:
        raise ConfigError(f"{cfg.model.path}: no eos_token_id, so answers would never stop")
    tokenizer = ChatTokenizer.load(cfg.model.path)
    render = RenderSettings(
        tokenizer=tokenizer,
        template_kwargs=cfg.data.template_kwargs,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_too_long_ratio=cfg.data.max_too_long_ratio,
        rewards=tuple(cfg.reward.functions),
    )
    if not cfg.data.train:
        raise ConfigError("data.train is empty: there is nothing to learn from")
    sampling = Sampling(
        seed=cfg.seed,
        max_new_tokens=cfg.rollout.max_response_tokens,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        stop_token_ids=model.eos_token_ids,
        wants_routing=cfg.algo.routing_replay,
    )
    sources = [open_source(name, source, render) for name, source in cfg.data.train.items()]
    held_out = {
        name: open_source(name, source, render).all() for name, source in cfg.data.eval.items()
    }
    return Inputs(model, tokenizer, sources, held_out, sampling)


class StartedEngine(Engine, Protocol):
    """An engine whose processes begin to come up."""

    def connect(self, hosts: Sequence[str], deadline_s: float) -> None:
        """Wait until it serves; hosts: of each rank. Raises EngineError or RemoteError."""
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def start(
    cfg: Config, inputs: Inputs, log_folder: Path, lost: Callable[[str], None] = log.error
) -> Iterator[Parts]:
    """Bring up Ray, trainer ranks, engines and reward workers; take all down again on leaving.
    Servers log to `log_folder`. lost: see open_session."""
    device = device_of(cfg)
    expected = Expected.of(replace(cfg, cluster=replace(cfg.cluster, device=device)), inputs.model)
    with contextlib.ExitStack() as stack:
        bundles = stack.enter_context(
            session.open_session(cfg.cluster, cfg.parallel.dims.world_size, device, lost)
        )
        check_groups([bundle.host for bundle in bundles], groups_of_neighbours(cfg))
        spots = _spots(cfg, bundles, device, log_folder)
        engines = _start_engines(cfg, inputs.model, spots, stack)
        trainer = _start_trainer(cfg, bundles, device, _environment(cfg))
        stack.callback(trainer.close)
        trainer.enter(Phase.generate)  # engines measure what is free when they come up
        _connect(engines, spots, cfg.cluster.start_timeout_s)
        rewards = stack.enter_context(reward_workers(cfg.reward))
        rollout = RolloutManager(engines, rewards, inputs.tokenizer, _rollout(cfg, inputs))
        weights = [source.weight for source in cfg.data.train.values()]
        yield Parts(
            trainer=trainer,
            rollout=rollout,
            prompts=PromptSource(inputs.sources, weights, derive_seed(cfg.seed, "prompts")),
            eval_sets=_eval_sets(cfg, inputs),
            credit=CreditSettings.of(cfg),
            packing=PackSettings.of(cfg, partial(train_flops, inputs.model)),
            num_probes=cfg.rollout.drift_samples,
            expected=expected,
        )


@contextlib.contextmanager
def start_evaluation(
    cfg: Config, inputs: Inputs, log_folder: Path
) -> Iterator[tuple[RolloutManager, Sequence[EvalSet]]]:
    """Engines with the weights of `model.path`, reward workers, and what to ask; no trainer."""
    from miles_lite.rollout.embedded.engine import EmbeddedEngine

    device, engine = device_of(cfg), cfg.rollout.engine
    if engine.backend != "embedded":
        raise ConfigError(
            f"rollout.engine.backend = {engine.backend}, which takes weights from a trainer only: "
            "set rollout.engine.backend=embedded"
        )
    with contextlib.ExitStack() as stack:
        bundles = stack.enter_context(
            session.open_session(cfg.cluster, engine.num_engines * engine.tp, device)
        )
        spots = _spots(cfg, bundles, device, log_folder)
        engines = _start_engines(cfg, inputs.model, spots, stack)
        _connect(engines, spots, cfg.cluster.start_timeout_s)
        for one in engines:
            assert isinstance(one, EmbeddedEngine)
            one.load_hf(cfg.model.path)
            one.enter(Phase.generate)
        rewards = stack.enter_context(reward_workers(cfg.reward))
        rollout = RolloutManager(engines, rewards, inputs.tokenizer, _rollout(cfg, inputs))
        rollout.version = 0
        yield rollout, _eval_sets(cfg, inputs)


def _connect(engines: Sequence[StartedEngine], spots: Sequence[Spot], deadline_s: float) -> None:
    """All at once: each may take minutes. Raises the first failure."""
    with ThreadPoolExecutor(len(engines)) as pool:
        calls = [
            pool.submit(engine.connect, [bundle.host for bundle in spot.bundles], deadline_s)
            for engine, spot in zip(engines, spots, strict=True)
        ]
        for call in as_completed(calls):
            call.result()


def _rollout(cfg: Config, inputs: Inputs) -> RolloutSettings:
    return RolloutSettings(
        sampling=inputs.sampling,
        vocab_size=inputs.model.vocab_size,
        routers=RouterSizes.of(inputs.model),
        num_prompts=cfg.rollout.num_prompts,
        samples_per_prompt=cfg.rollout.samples_per_prompt,
        dynamic_sampling=cfg.rollout.dynamic_sampling,
        over_sampling=cfg.rollout.over_sampling,
        invalid=cfg.reward.invalid,
        timeout_s=cfg.rollout.timeout_s,
    )


# ------------------------------------------------------------------ processes


def _start_trainer(
    cfg: Config, bundles: Sequence[Bundle], device: str, env: Mapping[str, str]
) -> TrainerGroup:
    from miles_lite.trainer.megatron.messages import WorkerSpec
    from miles_lite.trainer.megatron.worker import MegatronWorker

    spec = WorkerSpec(
        model_path=cfg.model.path,
        dtype=cfg.model.dtype,
        device=device,
        dims=cfg.parallel.dims,
        train=cfg.train,
        optim=cfg.optim,
        algo=cfg.algo,
        temperature=cfg.rollout.temperature,
        sync_timeout_s=cfg.sync.timeout_s,
        seed=cfg.seed,
    )
    workers = [
        spawn(
            MegatronWorker,
            f"trainer rank {rank} on {bundle.host}",
            spec,
            rank,
            bundle=bundle,
            share=TRAINER_SHARE,
            threads=1,
            env=env,
        )
        for rank, bundle in enumerate(bundles)
    ]
    hosts = [bundle.host for bundle in bundles]
    return TrainerGroup(workers, hosts, spec, cfg.sync.bucket_bytes, cfg.cluster.start_timeout_s)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an engine is to be."""

    name: str
    bundles: Sequence[Bundle]  # one a rank, neighbouring devices
    device: str
    env: Mapping[str, str]
    log_folder: Path

    def spawn(self, cls: type, given: Sequence[tuple[object, ...]]) -> list[Remote]:
        """All ranks, with what each is given; polls and buckets are answered while others wait."""
        how: Any = {"share": ENGINE_SHARE, "threads": 4, "env": self.env}
        return [
            spawn(cls, f"{self.name} rank {rank} on {bundle.host}", *mine, bundle=bundle, **how)
            for rank, (bundle, mine) in enumerate(zip(self.bundles, given, strict=True))
        ]


def _environment(cfg: Config) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(cfg.cluster.threads_per_rank)}


def _spots(cfg: Config, bundles: Sequence[Bundle], device: str, log_folder: Path) -> list[Spot]:
    size, env = cfg.rollout.engine.tp, _environment(cfg)
    return [
        Spot(f"engine {i}", bundles[i * size : (i + 1) * size], device, env, log_folder)
        for i in range(cfg.rollout.engine.num_engines)
    ]


def _start_engines(
    cfg: Config, model: NemotronH, spots: Sequence[Spot], stack: contextlib.ExitStack
) -> list[StartedEngine]:
    """They are closed with the stack."""
    engines = [_ENGINES[cfg.rollout.engine.backend](cfg, model, spot) for spot in spots]
    for engine in engines:
        stack.callback(engine.close)
    return engines


def _start_embedded(cfg: Config, model: NemotronH, spot: Spot) -> StartedEngine:
    from miles_lite.rollout.embedded.engine import EmbeddedEngine
    from miles_lite.rollout.embedded.options import EngineOptions
    from miles_lite.rollout.embedded.rank import EngineRank

    engine = cfg.rollout.engine
    options = EngineOptions(
        dtype=_TORCH_NAMES[cfg.model.dtype],
        device=spot.device,
        max_running=engine.max_running,
        max_seq_len=cfg.max_seq_len,
        prefill_tokens=engine.prefill_tokens,
        timeout_s=cfg.rollout.timeout_s,
        stall_s=engine.stall_s,
    )
    ranks = [(model, engine.dims, rank, options) for rank in range(engine.tp)]
    spawn = partial(spot.spawn, EngineRank, ranks)
    return EmbeddedEngine(spot.name, spawn, ranks[0][:2], options, cfg.rollout.timeout_s)


def _start_sglang(cfg: Config, model: NemotronH, spot: Spot) -> StartedEngine:
    from miles_lite.rollout.sglang.engine import LOADER, SGLangEngine
    from miles_lite.rollout.sglang.layout import Cuts, params
    from miles_lite.rollout.sglang.options import EngineSpec
    from miles_lite.rollout.sglang.rank import SGLangRank

    spec = replace(
        EngineSpec.of(cfg, cfg.model.path, spot.device),
        num_nodes=len({bundle.host for bundle in spot.bundles}),
        weight_loaders=(LOADER,),
    )
    cuts = Cuts.of(spec.extra)
    held = [params(model, spec.dims, rank, cuts) for rank in range(spec.dims.tp)]
    sync_s = cfg.sync.timeout_s
    ranks = [(f"{spot.name} rank {rank}", spec, mine, sync_s) for rank, mine in enumerate(held)]
    spawn, hosted = partial(spot.spawn, SGLangRank, ranks), (model, held)
    return SGLangEngine(spot.name, spawn, hosted, spec, spot.log_folder, cfg.rollout.timeout_s)


_ENGINES = {"embedded": _start_embedded, "sglang": _start_sglang}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def device_of(cfg: Config) -> str:
    if cfg.cluster.device != "auto":
        return cfg.cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------ data and rewards


def reward_workers(reward: RewardConfig) -> RewardWorkers:
    limits = RewardLimits(
        timeout_s=reward.timeout_s,
        memory_bytes=reward.memory_mb << 20,
        response_len=reward.max_chars,
        cache_len=reward.cache_len,
    )
    return RewardWorkers(reward.functions, reward.workers, limits)


def _check_megatron_fields(cfg: Config, model: NemotronH) -> None:
    """Refuse train.megatron fields that do not exist or contradict the model or the layout."""
    from miles_lite.trainer.megatron import cpu_compat
    from miles_lite.trainer.megatron.model import transformer_config
    from miles_lite.trainer.megatron.worker import DTYPES

    cpu_compat.install()
    transformer_config(
        model,
        cfg.parallel.dims,
        DTYPES[cfg.model.dtype],
        cfg.train.megatron,
        cfg.algo.routing_replay,
    )


def _check_sglang_options(cfg: Config) -> None:
    """Refuse rollout.engine.sglang where it contradicts the rest, or where SGLang refuses it."""
    from miles_lite.rollout.sglang.check import check_config

    check_config(cfg, device_of(cfg))


def audit_reward(cfg: Config, inputs: Inputs) -> list[Section]:
    """Grade answers of all kinds to some prompts of every source and held-out set."""
    return _audit(cfg, inputs, PROMPTS_PER_SOURCE, tuple(Kind))


def _check_reward(cfg: Config, inputs: Inputs) -> None:
    """Refuse a reward that a right answer in the model's own format can never win."""
    for section in _audit(cfg, inputs, PROBED_PROMPTS, (Kind.right,)):
        if section.hopeless:
            raise ValueError(section.failure)
        for warning in [*section.warnings, section.failure]:
            if warning:
                log.warning(warning)


def _audit(cfg: Config, inputs: Inputs, num_prompts: int, kinds: Collection[Kind]) -> list[Section]:
    prompts = [p for source in inputs.sources for p in source.sample(num_prompts)]
    prompts += [p for held_out in inputs.eval_prompts.values() for p in held_out[:num_prompts]]
    knows_thinking = inputs.tokenizer.knows(CLOSE)
    with reward_workers(cfg.reward) as workers:
        return asyncio.run(audit(prompts, workers, knows_thinking, kinds))


def _eval_sets(cfg: Config, inputs: Inputs) -> list[EvalSet]:
    sets = []
    for name, prompts in inputs.eval_prompts.items():
        own = cfg.eval.of(name)
        sampling = replace(
            inputs.sampling,
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=0,
            max_new_tokens=own.max_response_tokens or cfg.rollout.max_response_tokens,
            wants_routing=False,
        )
        sets.append(EvalSet(name, prompts, sampling, own.samples_per_prompt, own.pass_reward))
    return sets
