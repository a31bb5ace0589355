"""Why an engine's and a trainer's log-probs of one answer differ: from measurements to causes.

Shapes: N tokens of the answer, V the vocabulary. All log-probs are of the same tokens; differences
are means of |difference| in nats a token, as those of the run's headline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OF_THE_RUN = "weights or settings of the run's {}"
KINDS = {
    "M": "Mamba: its time step, convolution or state",
    "E": "experts, equally chosen: their scaling factor, weights or sum",
    "*": "attention",
    "-": "dense layer",
}


@dataclass(frozen=True, slots=True)
class Rounding:
    """What may differ without a cause, by the model's dtype."""

    nats: float  # of log-probs
    relative: float  # of hidden states, as a share of their norm
    explained: float = 0.2  # a cause is proven where it leaves less than this share of a difference


ROUNDING = {"fp32": Rounding(5e-4, 1e-3), "bf16": Rounding(3e-2, 3e-2)}


@dataclass(frozen=True, slots=True)
class LayerGap:
    """Hidden states behind one layer, |engine - trainer| / |trainer|, with routes replayed."""

    layer: int
    kind: str  # of the pattern
    mean: float  # over tokens
    max: float
    flips: float | None  # share of tokens whose experts the trainer would choose otherwise


@dataclass(frozen=True, slots=True)
class TensorGap:
    """An HF tensor that is not bitwise the same on both sides."""

    name: str
    max_diff: float
    rounded: bool  # one side is the other, rounded to bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An answer of the run: what its own engine and trainer said then, and what these two say."""

    drift: float  # then, of the whole answer
    engine: tuple[Tensor, Tensor]  # [N] then, and now in one prefill
    trainer: tuple[Tensor, Tensor]  # [N] then, and now
    step: int  # of the answer
    same_weights: bool  # those of that step are the checkpoint's
    alarm: float  # nats a token that were too many for the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was measured of one answer."""

    temperature: float  # what all log-probs should be of
    decoded: Tensor  # [N] by the engine, token by token
    prefilled: Tensor  # [N] by the engine, at once
    trained: Tensor  # [N] by the trainer, with its own routing
    replayed: Tensor  # [N] by the trainer, with the engine's routing
    packed: Tensor  # [N] by the trainer, behind another document
    full: Mapping[float, Tensor]  # temperature -> [N] from the logits of the engine's prefill
    log_kept: Tensor  # [N] log of the mass that top-p and top-k leave at each token
    layers: Sequence[LayerGap]
    tensors: Sequence[TensorGap]  # those that differ
    num_tensors: int
    decode_flips: float  # share of (token, layer) routed otherwise in decoding and prefill
    version_gap: int  # trainer's version - engine's
    recorded: Recorded | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    name: str
    size: float  # nats a token that it explains
    evidence: str


def gap(a: Tensor, b: Tensor) -> float:
    """Infinite where a number is missing: NaN is neither above a limit nor below."""
    return float((a.double() - b.double()).abs().mean().nan_to_num(nan=torch.inf))


def attribute(seen: Evidence, rounding: Rounding) -> list[Cause]:
    """Causes, the largest first; "rounding" alone where nothing needs another.

    Log-probs of another distribution are put right before kernels are blamed for what is left, and
    no kernel is blamed while weights differ.
    """
    causes, sides = _distributions(seen, rounding)
    decoded, prefilled, trained = sides["decoded"], sides["prefilled"], sides["trained"]
    moved = gap(prefilled, trained)
    if seen.version_gap:
        text = f"the engine serves weights {seen.version_gap} versions behind the trainer's"
        causes.append(Cause("stale weights", moved, text))
    if seen.tensors:
        causes.append(_weights(seen, moved))
    if (leak := gap(seen.packed, seen.trained)) > rounding.nats:
        text = "the trainer scores the answer otherwise behind another document in one micro-batch"
        causes.append(Cause("leaked state between packed documents", leak, text))
    if (size := gap(decoded, prefilled)) > rounding.nats:
        text = f"the engine's own prefill disagrees; {seen.decode_flips:.2%} of its routes flip"
        causes.append(Cause("decode against prefill", size, text))
    if seen.recorded is not None:
        causes += _of_the_run(seen, seen.recorded, rounding)
    if not (seen.tensors or seen.version_gap):
        causes += _kernels(seen, prefilled, trained, rounding)
    causes.sort(key=lambda cause: -cause.size)
    headline = gap(seen.decoded, seen.trained)
    return causes or [Cause("rounding", headline, "nothing differs by more than rounding")]


def _of_the_run(seen: Evidence, run: Recorded, rounding: Rounding) -> list[Cause]:
    """Engine and trainer here have the weights of one file: what was wrong between those of the run
    is seen in what they recorded, and nowhere else."""

    def far(size: float, here: float) -> bool:
        return size > max(min(rounding.nats, run.alarm), here / rounding.explained)

    engine, trainer = gap(*run.engine), gap(*run.trainer)
    causes = []
    if run.same_weights:
        noise = gap(seen.decoded, seen.prefilled), gap(seen.packed, seen.trained)
        sides = ("engine", engine, noise[0]), ("trainer", trainer, noise[1])
        causes = [
            Cause(_OF_THE_RUN.format(side), size, f"another {side} of the same weights disagrees")
            for side, size, here in sides
            if far(size, here)
        ]
    here = max(gap(seen.decoded, seen.trained), gap(run.engine[1], run.trainer[1]))
    if causes or not far(run.drift, here):
        return causes
    text = (
        f"they were {run.drift:.2g} apart in an answer of step {run.step}, here {here:.2g}; the "
        f"log-probs of then are {engine:.2g} from this engine's, {trainer:.2g} from this trainer's"
    )
    # updates move both sides alike: what is much further off than the other was wrong by that much
    name = "not reproduced: engine or trainer of the run"
    if min(engine, trainer) < rounding.explained * max(engine, trainer):
        name = _OF_THE_RUN.format("engine" if engine > trainer else "trainer")
    return [Cause(name, run.drift, text)]


def _distributions(seen: Evidence, rounding: Rounding) -> tuple[list[Cause], dict[str, Tensor]]:
    """Sides whose log-probs are of a truncated or otherwise heated distribution; and all of them as
    they would be without."""
    sides = {"decoded": seen.decoded, "prefilled": seen.prefilled, "trained": seen.trained}
    wrong: dict[tuple[str, str], dict[str, float]] = {}  # cause and evidence -> side -> size
    right = seen.full[seen.temperature]
    for side, logprobs in sides.items():
        off = gap(logprobs, right)
        if off <= rounding.nats:
            continue
        best = min(seen.full, key=lambda t: gap(logprobs, seen.full[t]))
        if gap(logprobs, right - seen.log_kept) < rounding.explained * off:
            share = float(seen.log_kept.exp().mean())
            cause = "sampling truncation", f"of what top-p and top-k keep, {share:.3f} of all mass"
            sides[side] = logprobs + seen.log_kept
        elif gap(logprobs, seen.full[best]) < rounding.explained * off:
            cause = "temperature", f"of temperature {best:g}, not {seen.temperature:g}"
            sides[side] = logprobs + right - seen.full[best]
        else:
            continue
        wrong.setdefault(cause, {})[side] = off
    causes = [
        Cause(name, max(found.values()), f"{' and '.join(found)} log-probs are those {text}")
        for (name, text), found in wrong.items()
    ]
    return causes, sides


def _weights(seen: Evidence, size: float) -> Cause:
    worst = sorted(seen.tensors, key=lambda tensor: -tensor.max_diff)
    names = ", ".join(f"{t.name} (by {t.max_diff:.2g})" for t in worst[:5])
    text = f"{len(worst)} of {seen.num_tensors} tensors differ: {names}"
    if all(tensor.rounded for tensor in worst):
        return Cause("weights rounded to bf16 on one side", size, text)
    # an update moves nearly all tensors, so an engine that missed one differs in nearly all
    stale = len(worst) > seen.num_tensors / 2
    return Cause("stale weights" if stale else "tensors not synced", size, text)


def _kernels(seen: Evidence, prefilled: Tensor, trained: Tensor, rounding: Rounding) -> list[Cause]:
    """Engine's prefill against trainer with equal weights: routers, and else the first layer. What
    is routed otherwise behind a layer that differs follows from that layer."""
    causes = []
    apart, left = gap(prefilled, trained), gap(prefilled, seen.replayed + trained - seen.trained)
    first = next((x for x in seen.layers if not x.mean <= rounding.relative), None)
    flipped = next((x for x in seen.layers if x.flips), None)
    if flipped and (first is None or flipped.layer <= first.layer):
        if apart - left > rounding.nats:
            text = (
                f"routers choose otherwise from layer {flipped.layer} on, there for "
                f"{flipped.flips:.2%} of tokens; {left:.2g} are left with routes replayed"
            )
            causes.append(Cause("routing", apart - left, text))
        apart = left
    if apart > rounding.nats and first is None:
        text = "no layer differs: final norm, output layer or log-softmax"
        causes.append(Cause("prefill against trainer: output", apart, text))
    elif apart > rounding.nats and first is not None:
        text = f"layer {first.layer} ({KINDS[first.kind]}) is the first, by {first.mean:.2g}"
        causes.append(Cause(f"prefill against trainer: {first.kind}", apart, text))
    return causes


def temperatures(right: float) -> list[float]:
    """Hypotheses: the right one, none at all, its square and inverse, and a grid of factors."""
    factors = torch.linspace(0.5, 2.0, 31).tolist()
    return list(dict.fromkeys([right, 1.0, right**2, 1 / right, *(right * f for f in factors)]))
