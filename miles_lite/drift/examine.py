"""One answer through one engine rank and one trainer rank of this process: what differs, and where.

Both sides host whole tensors (a layout of one rank). Weights are taken as they are on either side;
nothing here brings one side to the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miles_lite.algo.drift_parts import flip_rate
from miles_lite.drift.causes import Evidence, LayerGap, TensorGap, temperatures
from miles_lite.protocols import EngineError, Hosted
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.rollout.embedded.sampler import kept
from miles_lite.trainer.megatron.worker import MegatronWorker
from miles_lite.types import Completion, MicroBatch, Request, Sampling, TrainSequence
from miles_lite.weights.table import iter_segments


@dataclass(slots=True)
class Sides:
    engine: EngineRank  # in Phase.generate
    worker: MegatronWorker  # in Phase.train, with algo.routing_replay
    trainer_version: int
    next_uid: int = 0

    def ask(self, tokens: Sequence[int], sampling: Sampling, scored: Sequence[int]) -> Completion:
        """Draw an answer, or score one. Raises EngineError that names the rank when its serving
        ended, or does no step for stall_s."""
        self.next_uid += 1
        request = Request(self.next_uid, tuple(tokens), sampling, tuple(scored))
        engine, stall_s = self.engine, self.engine.options.stall_s
        name = f"engine 0 rank {engine.rank} on {os.uname().nodename}"
        try:
            engine.submit([request])
            num_steps, moved_at = engine.num_steps(), time.monotonic()
            while time.monotonic() - moved_at < stall_s:
                for _, completion in engine.poll(min(1.0, stall_s / 4)):
                    return completion
                if engine.num_steps() != num_steps:
                    num_steps, moved_at = engine.num_steps(), time.monotonic()
        except RuntimeError as error:
            raise EngineError(f"{name}: {error}") from error
        raise EngineError(f"{name}: no step for {stall_s:g} s (rollout.engine.stall_s)")


def examine(sides: Sides, prompt: Sequence[int], sampling: Sampling) -> Evidence:
    """Draw an answer to `prompt` and measure it. sampling: as in the run."""
    engine, worker = sides.engine, sides.worker
    sampling = replace(sampling, wants_routing=True)
    drawn = sides.ask(prompt, sampling, ())
    seen: dict[int, Tensor] = {}
    engine.model.watch = lambda layer, out: seen.update({layer: out.float().cpu()})
    try:
        scoring = replace(sampling, max_new_tokens=len(drawn.tokens))
        prefilled = sides.ask(prompt, scoring, drawn.tokens)
    finally:
        engine.model.watch = None
    logits = seen.pop(engine.config.num_layers)
    answer = as_sequence(prompt, prefilled)
    # the same tokens backwards: another document, whatever the answer is
    other = replace(answer, tokens=answer.tokens[::-1], sample=1)
    replayed, layers, flips = worker.look_inside(MicroBatch((answer,), (1.0,)))
    target = torch.tensor(drawn.tokens, device=logits.device)
    full = {
        t: (logits / t).log_softmax(-1).gather(1, target[:, None])[:, 0]
        for t in temperatures(sampling.temperature)
    }
    probs = (logits / sampling.temperature).softmax(-1)
    mass = (probs * kept(probs, [sampling] * len(probs))).sum(-1)
    tensors = weight_gaps(sides)
    return Evidence(
        temperature=sampling.temperature,
        decoded=torch.tensor(drawn.logprobs),
        prefilled=torch.tensor(prefilled.logprobs),
        trained=_scores(worker, answer),
        replayed=torch.tensor(replayed),
        packed=_scores(worker, answer, before=other),
        full=full,
        log_kept=mass.log(),
        layers=_layer_gaps(engine.config.pattern, seen, layers, flips),
        tensors=[found for found in tensors.values() if found is not None],
        num_tensors=len(tensors),
        decode_flips=flip_rate(drawn.routing, prefilled.routing),
        version_gap=sides.trainer_version - drawn.version,
    )


def reread(
    sides: Sides, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling, replayed: bool
) -> tuple[Completion, Tensor]:
    """An answer that was drawn before: as the engine's prefill has it, and the trainer's log-probs
    [N], with the routes of that prefill if `replayed`."""
    asked = replace(sampling, max_new_tokens=len(answer), wants_routing=True)
    read = sides.ask(prompt, asked, answer)
    sequence = as_sequence(prompt, read)
    if not replayed:
        return read, _scores(sides.worker, sequence)
    return read, torch.tensor(sides.worker.look_inside(MicroBatch((sequence,), (1.0,)))[0])


def control(sides: Sides, prompt: Sequence[int], answer: Completion) -> tuple[int, float]:
    """One update of a worker whose learning rate is 0: tensors that moved, and the largest change
    of the answer's log-probs. Anything but (0, 0) is a fault of the trainer."""
    worker, sequence = sides.worker, as_sequence(prompt, answer)
    before = {name: x.clone() for name, x in _whole(worker.hosted(), worker.tensor).items()}
    scores = _scores(worker, sequence)
    worker.step([[MicroBatch((replace(sequence, advantage=1.0),), (1.0,))]])
    after = _whole(worker.hosted(), worker.tensor)
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    return moved, float((_scores(worker, sequence) - scores).abs().max())


def weight_gaps(sides: Sides) -> Mapping[str, TensorGap | None]:
    """HF tensor -> how it differs between engine and trainer; None where it is bitwise the same."""
    engine = _whole(sides.engine.hosted(), sides.engine.tensor)
    trainer = _whole(sides.worker.hosted(), sides.worker.tensor)
    assert engine.keys() == trainer.keys(), engine.keys() ^ trainer.keys()
    return {name: _tensor_gap(name, engine[name], trainer[name]) for name in engine}


def _tensor_gap(name: str, a: Tensor, b: Tensor) -> TensorGap | None:
    a, b = a.float().cpu(), b.float().cpu()
    if torch.equal(a, b):
        return None
    rounded = torch.equal(a, b.bfloat16().float()) or torch.equal(b, a.bfloat16().float())
    return TensorGap(name, float((a - b).abs().max()), rounded)


def _whole(hosted: Sequence[Hosted], tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """HF tensors put together from what one rank hosts."""
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    for one in hosted:
        live = tensor(one.param).detach()
        live = live if one.index < 0 else live[one.index]
        for name, start, offset, count in iter_segments(one):
            rows = live.narrow(one.dim, offset, count)
            pieces.setdefault(name, []).append((start, one.dim, rows))
    whole = {}
    for name, parts in pieces.items():
        ordered = sorted(parts, key=lambda part: part[0])
        whole[name] = torch.cat([rows for _, _, rows in ordered], ordered[0][1])
    return whole


def as_sequence(prompt: Sequence[int], answer: Completion) -> TrainSequence:
    return TrainSequence(
        tokens=(*prompt, *answer.tokens),
        prompt_len=len(prompt),
        logprobs=answer.logprobs,
        sample=0,
        group=0,
        reward=0.0,
        advantage=0.0,
        counts=True,
        routing=answer.routing,
    )


def _scores(
    worker: MegatronWorker, sequence: TrainSequence, before: TrainSequence | None = None
) -> Tensor:
    """[N] by the trainer, alone or behind another sequence in the same micro-batch."""
    packed = (sequence,) if before is None else (before, sequence)
    return torch.tensor(worker.score([MicroBatch(packed, (1.0,) * len(packed))])[sequence.sample])


def _layer_gaps(
    pattern: str, engine: Mapping[int, Tensor], trainer: Sequence[Tensor], flips: Sequence[float]
) -> list[LayerGap]:
    """The engine never read the last token."""
    gaps, share = [], iter(flips)
    for layer, kind in enumerate(pattern):
        ours, theirs = trainer[layer][: len(engine[layer])], engine[layer]
        relative = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
        flipped = next(share, None) if kind == "E" else None
        gaps.append(LayerGap(layer, kind, float(relative.mean()), float(relative.max()), flipped))
    return gaps
