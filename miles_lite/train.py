"""The main loop: roll out, score, credit, pack, train, sync. Everything else hangs off it."""

from __future__ import annotations

import gc
import time

from miles_lite import resume
from miles_lite.alarms import Alarms, Limits
from miles_lite.algo.credit import rollout_metrics, to_sequences
from miles_lite.algo.drift_parts import drift_parts, spread
from miles_lite.algo.packing import pack, packing_metrics
from miles_lite.build import Parts
from miles_lite.cluster.actor import waited_for
from miles_lite.config import Config
from miles_lite.console import Console
from miles_lite.protocols import NonFiniteError, Phase
from miles_lite.rollout.evaluate import evaluate
from miles_lite.rollout.revival import Revival
from miles_lite.rollout.signal import SignalWatch
from miles_lite.run import Run, read_metrics
from miles_lite.stop import AlarmError, StopRequest


def train(cfg: Config, run: Run, parts: Parts, console: Console, stop: StopRequest) -> None:
    """cfg.train.num_steps steps, going on where the run stopped. Before the first rollout and after
    every step the engines are brought to the trainer's weights; a step's samples are all of one
    version, also when engines die on the way. With everything saved, raises Stopped at the end of
    a step after SIGTERM or SIGINT, and AlarmError at the end of one whose alarm is to end the
    run."""
    trainer, rollout = parts.trainer, parts.rollout
    console.watch(lambda: rollout.progress() or waited_for())
    watch = SignalWatch(cfg.reward.max_dead_steps)
    devices = Revival(trainer, rollout)
    console.phase("sync")
    devices.enter(Phase.sync)
    resume.restore(run, parts, watch)
    console.start_at(run.start)
    devices.send_weights(run.start)
    alarms = Alarms(Limits.of(cfg), read_metrics(run.folder))

    stop.in_steps = True
    gc.freeze()  # a million objects that stay: no collection of a step's garbage need look at them
    for step in range(run.start, cfg.train.num_steps):
        begin = time.perf_counter()
        console.phase("generate")
        devices.enter(Phase.generate)
        if _due(step, cfg.eval.every) or step == 0:
            _evaluate(run, step, parts, console)
        drawn = rollout.generate(parts.prompts)
        probed = spread(drawn.groups, parts.num_probes)
        rescored = rollout.rescore(list(probed.values()))
        sequences = to_sequences(drawn.groups, parts.credit)
        batch = pack(sequences, parts.packing)
        metrics = drawn.metrics | rollout_metrics(drawn.groups, sequences, parts.credit)
        metrics |= packing_metrics(batch, parts.packing)

        console.phase("train")
        devices.enter(Phase.train)
        try:
            result = trainer.step(batch)
        except NonFiniteError as error:  # leave what tells the alarm, and the samples to look at
            metrics |= error.result.metrics
            run.log(step, metrics | alarms.look(step, metrics))
            run.save_samples(step, drawn.groups, error.result, sequences)
            raise
        if _due(step + 1, cfg.algo.ref_update_interval):
            trainer.refresh_reference()
        metrics |= result.metrics
        metrics |= drift_parts(probed, rescored, result.logprobs, rollout.version)
        metrics["train/step"] = float((step + 1) * len(batch.updates) - 1)  # counts updates

        console.phase("sync")
        devices.enter(Phase.sync)
        metrics |= devices.send_weights(step + 1)

        metrics["perf/step_time"] = time.perf_counter() - begin
        metrics |= devices.metrics()
        metrics |= parts.expected.against(metrics)
        metrics |= alarms.look(step, metrics)
        if alarms.fatal:
            stop.ask(AlarmError(str(alarms.fatal)))
        run.log(step, metrics)
        run.save_samples(step, drawn.groups, result, sequences)
        console.step(step, metrics)
        watch.look(drawn.groups, metrics)
        resume.complete(run, parts)  # what an earlier step began
        if run.checkpoint_due(step + 1) or stop.asked or step + 1 == cfg.train.num_steps:
            console.phase("save")
            resume.save(step + 1, run, parts, watch, sequences, metrics)
        if stop.asked:
            resume.complete(run, parts)
            stop.heed()

    resume.complete(run, parts)
    stop.in_steps = False
    stop.heed()
    console.phase("evaluate")
    devices.enter(Phase.generate)
    _evaluate(run, cfg.train.num_steps, parts, console)
    devices.enter(Phase.sync)
    console.phase("export")
    trainer.export_hf(run.hf_folder)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _evaluate(run: Run, step: int, parts: Parts, console: Console) -> None:
    for eval_set in parts.eval_sets:
        metrics, groups = evaluate(parts.rollout, eval_set)
        run.log_eval(step, metrics)
        run.save_eval(step, eval_set.name, groups)
        console.evaluated(step, metrics)
