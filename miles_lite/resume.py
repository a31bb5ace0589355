"""Saving all that a restart needs, and going on from it as if nothing had happened."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miles_lite.algo.packing import PackSettings, pack
from miles_lite.build import Parts
from miles_lite.checkpoints import Checkpoint, CheckpointError
from miles_lite.claim import refuse_changes
from miles_lite.intact import writing
from miles_lite.metrics import ABS_DIFF, RUN_ID
from miles_lite.protocols import Metrics, Trainer
from miles_lite.rollout.signal import SignalWatch
from miles_lite.run import Run
from miles_lite.types import TrainSequence

logger = logging.getLogger(__name__)

Answer = tuple[tuple[int, ...], int]  # tokens with the prompt, and its length

PROBE = "probe.npz"  # of a checkpoint: the answers of its last step, and their log-probs
SURPRISE = 10.0  # times the drift of the engines: what scoring them again may differ by, on average
OUTLIER = 10.0  # times that: what one of them may, a short one being mostly noise
ROUNDING = 1e-5  # nats; and this much is always forgiven


@dataclass(frozen=True, slots=True)
class Probe:
    """Answers end to end. Of a large run these are many millions of numbers: no JSON."""

    tokens: np.ndarray  # [T] of all sequences
    lengths: np.ndarray  # [sequence]
    prompt_lengths: np.ndarray  # [sequence]
    scores: np.ndarray  # [response tokens of all] log-probs, fp32 as the trainer computes them

    @property
    def fault(self) -> str:
        """What `save` cannot have written, "" if it can."""
        whole = (self.tokens, self.lengths, self.prompt_lengths)
        if any(each.ndim != 1 for each in (*whole, self.scores)):
            return "arrays of other shapes"
        if any(each.dtype.kind not in "iu" for each in whole) or self.scores.dtype.kind != "f":
            return "arrays of other types"
        if not 0 < len(self.lengths) == len(self.prompt_lengths):
            return f"{len(self.lengths)} lengths of {len(self.prompt_lengths)} answers"
        lengths, prompts = self.lengths.astype(int), self.prompt_lengths.astype(int)
        if not ((prompts > 0) & (prompts <= lengths) & (lengths <= self.tokens.size)).all():
            return "lengths that are none"
        if (lengths.sum(), (lengths - prompts).sum()) != (self.tokens.size, self.scores.size):
            return "tokens, lengths and scores that do not fit each other"
        return "token ids below 0" if self.tokens.min() < 0 else ""

    def gaps(self, scores: Sequence[np.ndarray]) -> tuple[float, float]:
        """Nats a token between these and the probe's: on average, and of the worst answer."""
        again = np.concatenate(scores)
        apart = np.abs(again - self.scores)
        each = np.split(apart, np.cumsum(self.lengths - self.prompt_lengths)[:-1])
        return float(apart.mean()), max(float(one.mean()) for one in each if one.size)


def read_probe(path: Path) -> Probe:
    """Raises CheckpointError."""
    try:
        with np.load(path) as arrays:
            probe = Probe(**arrays)
            fault = probe.fault
    except Exception as error:  # a damaged archive raises all kinds
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise CheckpointError(
            f"{path} cannot be read ({fault}): remove {path.parent} to go on from an older "
            "checkpoint"
        )
    return probe


def save(
    step: int,
    run: Run,
    parts: Parts,
    watch: SignalWatch,
    sequences: Sequence[TrainSequence],
    metrics: Metrics,
) -> None:
    """Begin the checkpoint after `step` steps, and complete it unless that may wait. `sequences`:
    all of the last step."""
    folder = run.checkpoints.begin(step)
    parts.trainer.save(folder, run.saves_meanwhile)
    answers = [(s.tokens, s.prompt_len) for s in sequences]
    found = scores(answers, parts.trainer, parts.packing)
    with writing(folder / PROBE):
        np.savez(
            folder / PROBE,
            tokens=np.concatenate([np.asarray(s.tokens, np.int32) for s in sequences]),
            lengths=np.asarray([len(s.tokens) for s in sequences]),
            prompt_lengths=np.asarray([s.prompt_len for s in sequences]),
            scores=np.concatenate(found),
        )
    state = {
        "config": run.config,
        "layout": dict(parts.trainer.layout),
        "prompts": parts.prompts.state(),
        "num_dead": watch.num_dead,
        "metrics_bytes": run.metrics_bytes,
        RUN_ID: run.wandb_run_id,
        "drift": max(metrics[ABS_DIFF], metrics.get(f"{ABS_DIFF}_no_replay", 0.0)),
    }
    run.saving = step, state
    if not run.saves_meanwhile:
        complete(run, parts)


def complete(run: Run, parts: Parts) -> None:
    """The checkpoint that was begun, if any, is on disk and seen when this returns, and so are the
    samples of all steps before."""
    if run.saving is None:
        return
    run.settle()
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


def scores(answers: Sequence[Answer], trainer: Trainer, packing: PackSettings) -> list[np.ndarray]:
    """Log-probs of each response under the trainer's weights: one pass without gradients."""
    # some twice, so that there are as many for each DP rank, however many there are now
    missing = -len(answers) % trainer.dp
    padded = [*answers, *itertools.islice(itertools.cycle(answers), missing)]
    # the trainer's own routing is as good for comparing it with itself, and nothing to keep
    numbered = [
        TrainSequence(
            *(tokens, prompt_len, (0.0,) * (len(tokens) - prompt_len)),
            *(index, index),
            reward=0.0,
            advantage=0.0,
            counts=True,
        )
        for index, (tokens, prompt_len) in enumerate(padded)
    ]
    settings = dataclasses.replace(packing, global_batch=len(padded), train_zero_advantage=True)
    found = trainer.score(pack(numbered, settings))
    return [found[index] for index in range(len(answers))]


def _check_scores(found: Checkpoint, parts: Parts) -> None:
    probe = read_probe(found.folder / PROBE)
    tokens = np.split(probe.tokens, np.cumsum(probe.lengths)[:-1])
    prompt_lengths = probe.prompt_lengths.tolist()
    answers = [(tuple(t.tolist()), n) for t, n in zip(tokens, prompt_lengths, strict=True)]
    begin = time.perf_counter()
    gap, worst = probe.gaps(scores(answers, parts.trainer, parts.packing))
    told = f"scored the {len(answers)} answers of step {found.step - 1} again in "
    told += f"{time.perf_counter() - begin:.1f} s: {gap:.2g} nats a token apart"
    drift = found.state["drift"]
    if math.isnan(drift):  # of a step in which nothing was trained on
        logger.warning("%s, and no drift to hold it against", told)
        return
    limit = max(ROUNDING, SURPRISE * drift)
    if not (gap <= limit and worst <= OUTLIER * limit):  # also NaN
        raise CheckpointError(
            f"{found.folder}: the weights loaded give the last answers of the run log-probs that "
            f"differ by {gap:.3g} nats a token from those before saving, and of one answer by "
            f"{worst:.3g}: more than {limit:.3g}, or {OUTLIER * limit:.3g} for one. The files are "
            "as they were written, so model, libraries or hardware have changed; remove this "
            "checkpoint to go on from an older one"
        )
    logger.info(told)
