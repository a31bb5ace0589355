"""The experiment's own trainer and engines, once through the loop, at its layout, learning nothing.

Built by `build.start` as for training, with a learning rate of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from miles_lite import build, resume
from miles_lite.algo.credit import to_sequences
from miles_lite.algo.packing import pack
from miles_lite.build import Inputs, Parts
from miles_lite.cluster.lease import Lease
from miles_lite.config import Config
from miles_lite.doctor.finding import Finding, graded, ok, skipped
from miles_lite.metrics import ABS_DIFF
from miles_lite.protocols import Metrics, Phase
from miles_lite.types import Sampling, TrainSequence

PROMPTS = 8
ANSWER_TOKENS = 256  # at most: enough tokens to compare, and no minutes of decoding
# nats a token between engine and trainer, and between packed and not. fp32 is rounding alone; in
# bf16 published runs of these models have 0.01 to 0.015
MAX_DRIFT = {"fp32": 1e-4, "bf16": 0.03}

Checksums = Sequence[Mapping[tuple[str, int, int], int]]

FIXES = {
    "processes": "it names rank and host; logs of servers are in log.folder/doctor",
    "weight round trip": "run no training with it: weights of model, trainer and engine differ",
    "answers": "the engine's log; rollout.timeout_s where it is late",
    "drift": "engine and trainer compute different policies: compare dtype, kernels and versions",
    "learning rate 0": "something besides the optimizer changes weights, or gradients vanish",
    "packing": "sequences of a packed pass see each other: train.megatron, versions of kernels",
    "second sync": "engines do not come back from training: their log; memory saver, CUDA IPC",
}


def check(cfg: Config, inputs: Inputs, max_drift: float) -> Iterator[Finding]:
    """One finding after the other; after the first that could not be made the rest is skipped."""
    harmless = replace(cfg, optim=replace(cfg.optim, lr=0.0))
    told: list[str] = []
    try:
        with build.start(harmless, inputs, Path(cfg.log.folder) / "doctor") as parts:
            trial = Trial(parts, inputs.sampling, max_drift)
            for name, work in trial.checks.items():
                finding = work()
                told.append(name)
                yield finding
    except (RuntimeError, ValueError, OSError) as error:
        broken, *rest = [name for name in FIXES if name not in told]
        yield _failed(broken, str(error))
        yield from skip_all(f"{broken} failed", rest)


def skip_all(reason: str, names: Sequence[str] = tuple(FIXES)) -> list[Finding]:
    return [skipped(name, reason) for name in names]


class Trial:
    """The checks in their order; each goes on where the one before stopped."""

    def __init__(self, parts: Parts, sampling: Sampling, max_drift: float) -> None:
        self._parts, self._max_drift = parts, max_drift
        self._devices = Lease(parts.trainer, parts.rollout)
        self._sampling = replace(
            sampling, max_new_tokens=min(sampling.max_new_tokens, ANSWER_TOKENS)
        )
        self._sequences: list[TrainSequence] = []
        self._metrics: Metrics = {}
        self._moved: str = ""  # the first rows that the step changed

    @property
    def checks(self) -> Mapping[str, Callable[[], Finding]]:
        return {
            "processes": self.processes,
            "weight round trip": self.round_trip,
            "answers": self.answers,
            "drift": self.drift,
            "learning rate 0": self.learning_rate_0,
            "packing": self.packing,
            "second sync": self.second_sync,
        }

    def processes(self) -> Finding:
        layout = ", ".join(f"{name} {size}" for name, size in self._parts.trainer.layout.items())
        engines = self._parts.rollout.engines
        sizes = ", ".join(f"{engine.name} of {len(engine.receivers())}" for engine in engines)
        return ok("processes", f"trainer up ({layout}); {sizes} up")

    def round_trip(self) -> Finding:
        """Files -> trainer -> files' rows, and trainer -> engine with checksums of both sides."""
        self._devices.enter(Phase.sync)
        trainer = self._parts.trainer
        live, files = trainer.checksums(of_files=False), trainer.checksums(of_files=True)
        if odd := first_difference(files, live):
            return _failed("weight round trip", f"of the trainer's weights {odd}, not the files'")
        sent = trainer.send_weights(self._parts.rollout, version=0)
        return ok(
            "weight round trip",
            f"{sum(map(len, live))} pieces on {len(live)} ranks as in the files; "
            f"{sent['sync/bytes'] / 1e6:,.1f} MB to the engines in "
            f"{sent['perf/update_weights_time']:.1f} s, checksums equal on both sides",
        )

    def answers(self) -> Finding:
        """As many that every data-parallel rank has some to pack."""
        self._devices.enter(Phase.generate)
        dp, rollout = self._parts.trainer.dp, self._parts.rollout
        each = next(
            k for k in count(1) if PROMPTS * k % dp == 0 and PROMPTS * k >= 2 * dp
        )  # samples of a prompt
        prompts = self._parts.prompts.take(PROMPTS)
        groups = rollout.sample(prompts, self._sampling, each, "doctor")
        # advantages of both signs whatever the rewards, or there might be no gradient
        self._sequences = [
            replace(sequence, counts=True, advantage=1.0 if index % 2 else -1.0)
            for index, sequence in enumerate(to_sequences(groups, self._parts.credit))
        ]
        samples = [sample for group in groups for sample in group.samples]
        lengths = [len(sample.completion.tokens) for sample in samples]
        valid = [sample.verdict.reward for sample in samples if sample.verdict.valid]
        reasons = sorted({s.verdict.reason for s in samples if not s.verdict.valid})
        odd = [] if valid else [f"no verdict on any ({', '.join(reasons)}) -> reward-audit"]
        return graded(
            "answers",
            f"{len(samples)} to {PROMPTS} prompts, {min(lengths)} to {max(lengths)} tokens (at "
            f"most {self._sampling.max_new_tokens}), mean reward "
            f"{sum(valid) / max(1, len(valid)):.2f}, {len(samples) - len(valid)} without verdict",
            [],
            odd,
        )

    def drift(self) -> Finding:
        """A whole training step; engine against trainer on the way, and what it moved."""
        self._devices.enter(Phase.train)
        trainer = self._parts.trainer
        settings = replace(
            self._parts.packing, global_batch=len(self._sequences), train_zero_advantage=True
        )
        before = trainer.checksums(of_files=False)
        self._metrics = trainer.step(pack(self._sequences, settings)).metrics
        self._moved = first_difference(before, trainer.checksums(of_files=False))
        mean, most = self._metrics[ABS_DIFF], self._metrics[f"{ABS_DIFF}_max"]
        broken = self._metrics["train/nonfinite_logprobs"]
        told = (
            f"{mean:.2g} nats a token between engine and trainer on {PROMPTS} prompts, at most "
            f"{most:.2g}; bound {self._max_drift:g}"
        )
        if broken or not mean <= self._max_drift:
            return _failed("drift", told + (f"; {broken:g} log-probs not finite" if broken else ""))
        return ok("drift", told)

    def learning_rate_0(self) -> Finding:
        norm, rate = self._metrics["train/grad_norm"], self._metrics["train/lr-pg_0"]
        told = f"gradient norm {norm:.3g}, learning rate {rate:g}"
        if self._moved:
            return _failed("learning rate 0", f"a step changed weights: {self._moved}; {told}")
        if not norm > 0:
            return _failed("learning rate 0", f"no weight changed, but {told}: nothing is shown")
        return ok("learning rate 0", f"no bit of any weight changed; {told}")

    def packing(self) -> Finding:
        """Log-probs of all sequences in few passes against those of each in a pass of its own."""
        trainer, packing, name = self._parts.trainer, self._parts.packing, "packing"
        settings = replace(packing, global_batch=len(self._sequences), train_zero_advantage=True)
        (update,) = pack(self._sequences, settings).updates
        num_passes = update.num_micro_batches * trainer.dp
        if num_passes == len(self._sequences):
            reason = f"each of {num_passes} sequences fills a pass of {packing.max_tokens} tokens"
            return skipped(name, reason)
        answers = [(s.tokens, s.prompt_len) for s in self._sequences]
        together = resume.scores(answers, trainer, packing)
        rest = iter(answers)
        apart: list[np.ndarray] = []
        while some := list(islice(rest, trainer.dp)):  # one on every rank
            apart += resume.scores(some, trainer, packing)
        gaps = np.abs(np.concatenate(together) - np.concatenate(apart))
        mean = gaps.mean(dtype=float)
        told = (
            f"{mean:.2g} nats a token between {len(apart)} sequences in {num_passes} passes and "
            f"each alone, at most {gaps.max():.2g}; bound {self._max_drift:g}"
        )
        return ok(name, told) if mean <= self._max_drift else _failed(name, told)

    def second_sync(self) -> Finding:
        """After training, when engines took their memory back."""
        self._devices.enter(Phase.sync)
        sent = self._parts.trainer.send_weights(self._parts.rollout, version=1)
        seconds = sent["perf/update_weights_time"]
        return ok("second sync", f"version 1 on all engines in {seconds:.1f} s, checksums equal")


def first_difference(one: Checksums, other: Checksums) -> str:
    """Where two sets of checksums differ, by rank; "" if nowhere."""
    odd = [
        (rank, rows)
        for rank, (ours, theirs) in enumerate(zip(one, other, strict=True))
        for rows in ours
        if ours[rows] != theirs[rows]
    ]
    if not odd:
        return ""
    rank, (tensor, start, stop) = odd[0]
    return (
        f"{len(odd)} of {sum(map(len, one))} pieces differ, the first is {tensor} rows "
        f"{start}:{stop} on trainer rank {rank}"
    )


def _failed(name: str, told: str) -> Finding:
    return Finding(name, "failed", told, FIXES[name])
