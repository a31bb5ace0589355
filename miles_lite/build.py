"""Composition root: from a checked configuration to living objects. The only place that knows which
class stands behind a name; back-ends are imported when they are chosen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from miles_lite.cluster import session
from miles_lite.cluster.actor import spawn
from miles_lite.cluster.placement import Bundle
from miles_lite.config import Config, ConfigError
from miles_lite.data.prompts import PromptSource, load_prompts
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import rules
from miles_lite.rollout.evaluate import EvalSet
from miles_lite.rollout.manager import RolloutManager, derive_seed
from miles_lite.rollout.reward_check import Thinking, preflight
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.trainer.group import TrainerGroup
from miles_lite.types import Prompt, Sampling

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from miles_lite.rollout.embedded.engine import EmbeddedEngine

TRAINER_SHARE, ENGINE_SHARE = 0.4, 0.2  # of a device, for Ray's book-keeping only


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works with."""

    trainer: TrainerGroup
    rollout: RolloutManager
    prompts: PromptSource
    eval_set: EvalSet | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What can be read and checked before any process starts."""

    model: NemotronH
    tokenizer: ChatTokenizer
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    sampling: Sampling


def check(cfg: Config) -> Inputs:
    """Read model config, tokenizer and data, and refuse all that cannot run. Starts nothing that
    lasts. Raises ValueError (ConfigError where a key is to blame)."""
    model = NemotronH.from_folder(cfg.model.path)
    rules.check(cfg, model)
    if cfg.train.megatron:
        _check_megatron_fields(cfg, model)
    tokenizer = ChatTokenizer.load(cfg.model.path)
    train_prompts = _load(cfg, cfg.data.train, tokenizer)
    eval_prompts = _load(cfg, cfg.data.eval, tokenizer) if cfg.data.eval else []
    if not model.eos_token_ids:
        raise ConfigError(f"{cfg.model.path}: no eos_token_id, so answers would never stop")
    _check_reward(cfg, train_prompts[0])
    sampling = Sampling(
        seed=cfg.seed,
        max_new_tokens=cfg.rollout.max_response_tokens,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        stop_token_ids=model.eos_token_ids,
    )
    return Inputs(model, tokenizer, train_prompts, eval_prompts, sampling)


@contextlib.contextmanager
def start(cfg: Config, inputs: Inputs) -> Iterator[Parts]:
    """Bring up Ray, trainer ranks, engines and reward workers; take all down again on leaving."""
    device = _device(cfg)
    with contextlib.ExitStack() as stack:
        bundles = stack.enter_context(
            session.open_session(cfg.cluster, cfg.parallel.dims.world_size, device)
        )
        env = {"OMP_NUM_THREADS": str(cfg.cluster.threads_per_rank)}
        engines = _start_engines(cfg, inputs.model, bundles, device, env)
        trainer = _start_trainer(cfg, bundles, device, env)
        stack.callback(trainer.close)
        for index, engine in enumerate(engines):
            stack.callback(engine.close)
            host = bundles[index * cfg.rollout.engine.tp].host
            engine.connect(host, cfg.cluster.start_timeout_s)
        rewards = stack.enter_context(_reward_workers(cfg, cfg.reward.workers))
        rollout = RolloutManager(
            engines,
            rewards,
            inputs.tokenizer,
            inputs.sampling,
            cfg.rollout.samples_per_prompt,
            cfg.rollout.timeout_s,
        )
        prompts = PromptSource(inputs.train_prompts, derive_seed(cfg.seed, "prompts"))
        yield Parts(trainer, rollout, prompts, _eval_set(cfg, inputs))


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
    host = bundles[0].host
    return TrainerGroup(workers, host, spec, cfg.sync.bucket_bytes, cfg.cluster.start_timeout_s)


def _start_engines(
    cfg: Config,
    model: NemotronH,
    bundles: Sequence[Bundle],
    device: str,
    env: Mapping[str, str],
) -> list[EmbeddedEngine]:
    """Engine i sits on the i-th run of tp neighbouring devices."""
    from miles_lite.rollout.embedded.engine import EmbeddedEngine
    from miles_lite.rollout.embedded.options import EngineOptions
    from miles_lite.rollout.embedded.rank import EngineRank

    engine = cfg.rollout.engine
    options = EngineOptions(
        dtype=_TORCH_NAMES[cfg.model.dtype],
        device=device,
        max_running=engine.max_running,
        max_seq_len=cfg.data.max_prompt_tokens
        + max(cfg.rollout.max_response_tokens, cfg.eval.max_response_tokens),
        prefill_tokens=engine.prefill_tokens,
        timeout_s=cfg.rollout.timeout_s,
    )
    engines = []
    for index in range(engine.num_engines):
        name = f"engine {index}"
        ranks = [
            spawn(
                EngineRank,
                f"{name} rank {rank} on {bundle.host}",
                model,
                engine.dims,
                rank,
                options,
                bundle=bundle,
                share=ENGINE_SHARE,
                threads=4,  # poll waits while others go on
                env=env,
            )
            for rank, bundle in enumerate(bundles[index * engine.tp : (index + 1) * engine.tp])
        ]
        engines.append(
            EmbeddedEngine(name, ranks, (model, engine.dims), options, cfg.rollout.timeout_s)
        )
    return engines


_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def _device(cfg: Config) -> str:
    if cfg.cluster.device != "auto":
        return cfg.cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------ data and rewards


def _load(cfg: Config, path: str, tokenizer: ChatTokenizer) -> list[Prompt]:
    return load_prompts(
        path,
        tokenizer,
        prompt_key=cfg.data.prompt_key,
        label_key=cfg.data.label_key,
        template_kwargs=cfg.data.template_kwargs,
        max_prompt_len=cfg.data.max_prompt_tokens,
    )


def _reward_workers(cfg: Config, num_workers: int) -> RewardWorkers:
    reward = cfg.reward
    limits = RewardLimits(
        timeout_s=reward.timeout_s,
        memory_bytes=reward.memory_mb << 20,
        response_len=reward.max_chars,
    )
    return RewardWorkers(reward.file, reward.function, num_workers, limits)


def _check_megatron_fields(cfg: Config, model: NemotronH) -> None:
    """Refuse train.megatron fields that do not exist or contradict the model or the layout."""
    from miles_lite.trainer.megatron import cpu_compat
    from miles_lite.trainer.megatron.model import transformer_config
    from miles_lite.trainer.megatron.worker import DTYPES

    cpu_compat.install()
    transformer_config(model, cfg.parallel.dims, DTYPES[cfg.model.dtype], cfg.train.megatron)


def _check_reward(cfg: Config, prompt: Prompt) -> None:
    """Refuse a reward that a right answer in the model's own format can never win."""
    with _reward_workers(cfg, num_workers=1) as workers:
        check = preflight(
            lambda response, label: asyncio.run(workers.grade(response, label)),
            prompt.text,
            prompt.label,
            name=cfg.reward.function,
        )
    if check.needs_thinking and check.thinking is Thinking.unsaid:
        log.warning(
            "reward %s wants </think> before the answer, but the chat template opens no think "
            "block: it stays 0 unless the model writes the markers on its own",
            cfg.reward.function,
        )


def _eval_set(cfg: Config, inputs: Inputs) -> EvalSet | None:
    if not inputs.eval_prompts:
        return None
    sampling = replace(
        inputs.sampling,
        temperature=cfg.eval.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=cfg.eval.max_response_tokens or cfg.rollout.max_response_tokens,
    )
    name = Path(cfg.data.eval.split("@")[0]).stem
    return EvalSet(name, inputs.eval_prompts, sampling, cfg.eval.samples_per_prompt)
