"""The main loop: roll out, score, credit, pack, train, sync. Everything else hangs off it."""

from __future__ import annotations

import time

from miles_lite.algo.credit import rollout_metrics, to_sequences
from miles_lite.algo.packing import pack, packing_metrics
from miles_lite.cluster.lease import Lease
from miles_lite.config import Config
from miles_lite.console import Console
from miles_lite.data.prompts import PromptSource
from miles_lite.protocols import Phase, Trainer
from miles_lite.rollout.evaluate import EvalSet, evaluate
from miles_lite.rollout.manager import RolloutManager, throughput
from miles_lite.run import Run


def train(
    cfg: Config,
    run: Run,
    trainer: Trainer,
    rollout: RolloutManager,
    prompts: PromptSource,
    eval_set: EvalSet | None,
    console: Console,
) -> None:
    """cfg.train.num_steps steps from run.start. Before the first rollout and after every step the
    engines are brought to the trainer's weights; a step's samples are all of one version."""
    devices = Lease(trainer, rollout)
    console.phase("sync")
    devices.enter(Phase.sync)
    trainer.send_weights(rollout, version=run.start)

    for step in range(run.start, cfg.train.num_steps):
        begin = time.perf_counter()
        console.phase("generate")
        devices.enter(Phase.generate)
        if eval_set and _eval_due(step, run.start, cfg.eval.every):
            _evaluate(run, step, rollout, eval_set, console)
        begin_rollout = time.perf_counter()
        groups = rollout.generate(prompts.take(cfg.rollout.num_prompts))
        metrics = throughput(groups, begin_rollout)
        metrics |= rollout_metrics(groups, normalize_std=cfg.algo.normalize_std)

        batch = pack(
            to_sequences(groups, normalize_std=cfg.algo.normalize_std),
            dp=trainer.dp,
            global_batch=cfg.train.global_batch,
            max_tokens=cfg.train.max_tokens_per_micro_batch,
            hard_cap=cfg.train.max_sequence_tokens,
            aggregation=cfg.algo.aggregation,
        )
        metrics |= packing_metrics(batch)

        console.phase("train")
        devices.enter(Phase.train)
        result = trainer.step(batch)
        metrics |= result.metrics
        metrics["train/step"] = float((step + 1) * len(batch.updates) - 1)  # counts updates

        console.phase("sync")
        devices.enter(Phase.sync)
        metrics |= trainer.send_weights(rollout, version=step + 1)

        metrics["perf/step_time"] = time.perf_counter() - begin
        run.log(step, metrics | devices.metrics())
        if cfg.log.samples:
            run.save_samples(step, groups, result.logprobs)
        console.step(step, metrics)

    if eval_set:
        console.phase("evaluate")
        devices.enter(Phase.generate)
        _evaluate(run, cfg.train.num_steps, rollout, eval_set, console)
        devices.enter(Phase.sync)
    console.phase("export")
    trainer.export_hf(run.hf_folder)


def _eval_due(step: int, start: int, every: int) -> bool:
    return step == start or (every > 0 and step % every == 0)


def _evaluate(
    run: Run, step: int, rollout: RolloutManager, eval_set: EvalSet, console: Console
) -> None:
    metrics, groups = evaluate(rollout, eval_set)
    run.log_eval(step, metrics)
    run.save_eval(step, eval_set.name, groups)
    console.evaluated(step, metrics)
