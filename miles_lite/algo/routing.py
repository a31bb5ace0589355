"""Which experts computed a token: what an engine tells, packed small, and checked before use.

Shapes: T tokens of a sequence, L layers with experts (the `E` of the pattern), K choices each. The
order within the K means nothing: weights are the trainer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.types import Routing, TrainSequence

UNKNOWN = -1  # in place of an expert, where the engine computed nothing


@dataclass(frozen=True, slots=True)
class RouterSizes:
    """What the routing of a model must look like."""

    num_layers: int  # with experts
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, model: NemotronH) -> RouterSizes:
        return cls(model.pattern.count("E"), model.top_k, model.num_experts)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    def pack(self, choices_T_L_K: np.ndarray) -> Routing:
        """From ids of any integer type. Raises ValueError for what is no expert of the model."""
        low, high = choices_T_L_K.min(initial=0), choices_T_L_K.max(initial=0)
        if low < 0 or high >= self.num_experts:
            raise ValueError(
                f"routing names experts {low} .. {high}; the model has 0 .. {self.num_experts - 1}"
            )
        num_tokens, num_layers, top_k = choices_T_L_K.shape
        packed = np.ascontiguousarray(choices_T_L_K, self.dtype)
        return Routing(packed.tobytes(), (num_tokens, num_layers, top_k), self.dtype.itemsize)

    def shape_fault(self, routing: Routing, num_tokens: int) -> str:
        """What is wrong with the shape of the routing of a sequence of `num_tokens`; "" if nothing
        is. The last token was never read, so it has none."""
        expected = (num_tokens - 1, self.num_layers, self.top_k)
        wanted = f"expected {list(expected)} (tokens - 1, layers with experts, top k)"
        if not routing.known:
            return f"there is no routing; {wanted}"
        if routing.shape != expected:
            return f"the routing has shape {list(routing.shape)}; {wanted}"
        num_bytes, size = int(np.prod(expected)) * self.dtype.itemsize, len(routing.experts)
        if size != num_bytes or routing.item_bytes != self.dtype.itemsize:
            return (
                f"the routing has {size} bytes, {routing.item_bytes} each; expected {num_bytes}, "
                f"{self.dtype.itemsize} each for {self.num_experts} experts"
            )
        return ""

    def choice_fault(self, choices_T_L_K: np.ndarray) -> str:
        """The first token that has not K different experts of the model; "" if there is none."""
        ranked = np.sort(choices_T_L_K, axis=-1)
        bad = (ranked[..., 1:] == ranked[..., :-1]).any(-1)
        bad |= ranked[..., -1] >= self.num_experts
        if not bad.any():
            return ""
        token, layer = np.argwhere(bad)[0].tolist()
        return (
            f"token {token} has experts {choices_T_L_K[token, layer].tolist()} in layer {layer} of "
            f"those with experts; expected {self.top_k} different ones of 0 .. "
            f"{self.num_experts - 1}"
        )


def choices(routing: Routing) -> np.ndarray:
    """[T, L, K] unsigned, read-only: a view, nothing is copied."""
    dtype = np.uint8 if routing.item_bytes == 1 else np.uint16
    return np.frombuffer(routing.experts, dtype).reshape(routing.shape)


def of_all_layers(choices_T_N_K: np.ndarray, model: NemotronH) -> Routing:
    """From ids for all N layers of the model, of which those without experts say nothing.

    This is how SGLang tells it: int32, zeros where a layer has no experts.
    """
    if choices_T_N_K.ndim != 3 or choices_T_N_K.shape[1] != model.num_layers:
        raise ValueError(
            f"routing of shape {list(choices_T_N_K.shape)}; expected [tokens - 1, "
            f"{model.num_layers} layers, {model.top_k}]"
        )
    layers = [layer for layer, kind in enumerate(model.pattern) if kind == "E"]
    return RouterSizes.of(model).pack(choices_T_N_K[:, layers])


def end_to_end(
    sequences: Sequence[TrainSequence], num_tokens: int, layers: slice, top_k: int
) -> np.ndarray:
    """int16 [num_tokens, layers, K] of sequences packed end to end; UNKNOWN at the last token of
    each and in the padding after them."""
    packed = np.full((num_tokens, layers.stop - layers.start, top_k), UNKNOWN, np.int16)
    start = 0
    for sequence in sequences:
        end = start + len(sequence.tokens)
        packed[start : end - 1] = choices(sequence.routing)[:, layers]
        start = end
    return packed
