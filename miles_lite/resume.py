"""Saving all that a restart needs, and going on from it as if nothing had happened."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from miles_lite.algo.packing import PackSettings, pack
from miles_lite.build import Parts
from miles_lite.checkpoints import Checkpoint, CheckpointError
from miles_lite.claim import refuse_changes
from miles_lite.protocols import Metrics, Trainer
from miles_lite.rollout.signal import SignalWatch
from miles_lite.run import Run
from miles_lite.types import NO_ROUTING, Batch, TrainSequence

logger = logging.getLogger(__name__)

PROBES = 4  # sequences a DP rank, scored again after loading
SURPRISE = 10.0  # times the drift of the engines: what scoring them again may differ by
ROUNDING = 1e-5  # nats; and this much is always forgiven
DRIFT = "train/train_rollout_logprob_abs_diff"


def save(
    step: int, run: Run, parts: Parts, watch: SignalWatch, batch: Batch, metrics: Metrics
) -> None:
    """Begin the checkpoint after `step` steps, and complete it unless that may wait."""
    parts.trainer.save(run.checkpoints.begin(step), run.saves_meanwhile)
    # the trainer's own routing is as good for comparing it with itself, and nothing to keep
    probe = [
        dataclasses.replace(sequence, routing=NO_ROUTING)
        for sequence in batch.sequences[: PROBES * parts.trainer.dp]
    ]
    state = {
        "config": run.config,
        "layout": dict(parts.trainer.layout),
        "prompts": parts.prompts.state(),
        "num_dead": watch.num_dead,
        "metrics_bytes": run.metrics_bytes,
        "drift": max(metrics[DRIFT], metrics.get(f"{DRIFT}_no_replay", 0.0)),
        "probe": [_plain(sequence) for sequence in probe],
        "scores": scores(probe, parts.trainer, parts.packing),
    }
    run.saving = step, state
    if not run.saves_meanwhile:
        complete(run, parts)


def complete(run: Run, parts: Parts) -> None:
    """The checkpoint that was begun, if any, is on disk and seen when this returns."""
    if run.saving is None:
        return
    (step, state), run.saving = run.saving, None
    parts.trainer.finish_save()
    checkpoint = run.checkpoints.commit(step, state, parts.trainer.digests)
    run.checkpoint_done()
    logger.info("saved %s", checkpoint.folder)


def restore(run: Run, parts: Parts, watch: SignalWatch) -> None:
    """Bring all parts to the newest intact checkpoint of the run, and `run.start` to its step.

    If none was ever completed the run starts anew, and what an earlier attempt logged is dropped.
    Raises CheckpointError if none is intact, or if the loaded weights score the probe otherwise
    than the saved ones did.
    """
    found = next(run.checkpoints.intact(parts.trainer.digests), None)
    if found is None:
        run.rewind(0, metrics_bytes=0)
        return
    state = found.state
    refuse_changes(found.folder, state["config"], run.config)  # config.yaml may have been lost
    parts.trainer.load(found.folder, same_layout=state["layout"] == dict(parts.trainer.layout))
    _check_scores(found, parts)
    parts.prompts.restore(state["prompts"])
    watch.num_dead = state["num_dead"]
    run.rewind(found.step, state["metrics_bytes"])
    logger.info("going on after step %d, from %s", found.step, found.folder)


def scores(
    probe: Sequence[TrainSequence], trainer: Trainer, packing: PackSettings
) -> list[list[float]]:
    """Log-probs of each sequence's response under the trainer's weights."""
    numbered = [
        dataclasses.replace(sequence, sample=index, counts=True)
        for index, sequence in enumerate(probe)
    ]
    settings = dataclasses.replace(packing, global_batch=len(probe), train_zero_advantage=True)
    found = trainer.score(pack(numbered, settings))
    return [list(found[index]) for index in range(len(probe))]


def _check_scores(found: Checkpoint, parts: Parts) -> None:
    state = found.state
    probe = [_sequence(values) for values in state["probe"]]
    # some twice, so that there are as many for each DP rank, however many there are now
    padded = [*probe, *itertools.islice(itertools.cycle(probe), -len(probe) % parts.trainer.dp)]
    again = scores(padded, parts.trainer, parts.packing)[: len(probe)]
    pairs = zip(state["scores"], again, strict=True)
    gaps = [abs(a - b) for before, after in pairs for a, b in zip(before, after, strict=True)]
    gap = statistics.fmean(gaps)
    if math.isnan(state["drift"]):  # of a step in which nothing was trained on
        logger.warning(
            "scored %d answers again: %.2g nats a token apart, and no drift to hold it against",
            len(probe),
            gap,
        )
        return
    limit = max(ROUNDING, SURPRISE * state["drift"])
    if not gap <= limit:  # also NaN
        raise CheckpointError(
            f"{found.folder}: the weights loaded give the last answers of the run log-probs that "
            f"differ by {gap:.3g} nats a token from those before saving, more than {limit:.3g}. "
            "The files are as they were written, so model, libraries or hardware have changed; "
            "remove this checkpoint to go on from an older one"
        )
    logger.info("scored %d answers again: %.2g nats a token apart", len(probe), gap)


def _plain(sequence: TrainSequence) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(sequence).items() if k != "routing"}


def _sequence(values: Mapping[str, Any]) -> TrainSequence:
    """From JSON, which knows no tuples."""
    made: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return TrainSequence(**made)
