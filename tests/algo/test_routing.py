"""Routing as it travels: small, whole, and refused when it is not what it should be."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from miles_lite.algo.routing import UNKNOWN, RouterSizes, choices, end_to_end, of_all_layers
from miles_lite.compose import compose
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.types import NO_ROUTING, Routing, TrainSequence

FEW, MANY = RouterSizes(2, 3, 256), RouterSizes(2, 3, 512)


def drawn(sizes: RouterSizes, num_tokens: int, seed: int = 0) -> np.ndarray:
    rank = np.random.default_rng(seed).random((num_tokens, sizes.num_layers, sizes.num_experts))
    return rank.argsort(-1)[..., : sizes.top_k]


@pytest.mark.parametrize(("sizes", "item_bytes"), [(FEW, 1), (MANY, 2)])
def test_packed_and_read_again(sizes: RouterSizes, item_bytes: int) -> None:
    ids = drawn(sizes, 50)
    ids[7, 1] = 0, 4, sizes.num_experts - 1
    routing = sizes.pack(ids.astype(np.int32))
    assert len(routing.experts) == 50 * 2 * 3 * item_bytes and routing.known
    assert np.array_equal(choices(routing), ids)
    assert len(repr(routing)) < 100  # megabytes, in a message
    assert sizes.shape_fault(routing, 51) == sizes.choice_fault(choices(routing)) == ""


@pytest.mark.parametrize("wrong", [-1, 256])
def test_an_expert_that_does_not_exist_is_not_packed(wrong: int) -> None:
    ids = drawn(FEW, 5)
    ids[2, 1, 0] = wrong
    with pytest.raises(ValueError, match=rf"names experts .*{wrong}.*; the model has 0 \.\. 255"):
        FEW.pack(ids)


def test_between_processes_nothing_is_copied() -> None:
    """Out of band, as Ray does it, the bytes stay where they are; otherwise they come along."""
    routing, buffers = FEW.pack(drawn(FEW, 5000)), []
    message = pickle.dumps(routing, protocol=5, buffer_callback=buffers.append)
    assert len(message) < 200 and len(buffers) == 1
    shared = np.frombuffer(bytearray(buffers[0].raw()), np.uint8)
    got = pickle.loads(message, buffers=[shared])
    assert got == routing and np.shares_memory(choices(got), shared)
    again = pickle.loads(pickle.dumps(got))  # an older protocol, of a view
    assert again == routing and isinstance(again.experts, bytes)
    assert pickle.loads(pickle.dumps(NO_ROUTING)) == NO_ROUTING and not NO_ROUTING.known


@pytest.mark.parametrize(
    ("routing", "fault"),
    [
        (NO_ROUTING, "there is no routing; expected [6, 2, 3]"),
        (FEW.pack(drawn(FEW, 7)), "the routing has shape [7, 2, 3]; expected [6, 2, 3]"),
        (RouterSizes(5, 3, 8).pack(drawn(RouterSizes(5, 3, 8), 6)), "has shape [6, 5, 3]"),
        (Routing(bytes(35), (6, 2, 3), 1), "35 bytes, 1 each; expected 36, 1 each for 256"),
        (MANY.pack(drawn(MANY, 6)), "72 bytes, 2 each; expected 36, 1 each for 256 experts"),
    ],
)
def test_what_is_expected_and_found_is_told(routing: Routing, fault: str) -> None:
    assert fault in FEW.shape_fault(routing, 7)


def test_choices_are_different_experts() -> None:
    ids = drawn(RouterSizes(2, 3, 8), 6)
    for planted in ([4, 1, 4], [1, 2, 8]):
        bad = ids.copy()
        bad[4, 1] = planted
        fault = RouterSizes(2, 3, 8).choice_fault(bad)
        assert fault.startswith(f"token 4 has experts {planted} in layer 1 of those with experts")


def test_of_all_layers_those_with_experts_stay() -> None:
    model = NemotronH.from_folder(compose(["experiment=tiny"]).model.path)
    sizes = RouterSizes.of(model)
    ids = drawn(sizes, 9)
    told = np.zeros((9, model.num_layers, model.top_k), np.int32)
    told[:, [layer for layer, kind in enumerate(model.pattern) if kind == "E"]] = ids
    assert of_all_layers(told, model) == sizes.pack(ids)
    with pytest.raises(ValueError, match=rf"expected \[tokens - 1, {model.num_layers} layers"):
        of_all_layers(told[:, :-1], model)


def test_end_to_end() -> None:
    sequences = [
        TrainSequence(
            tokens=(1,) * length,
            prompt_len=1,
            logprobs=(0.0,) * (length - 1),
            sample=length,
            group=0,
            reward=0.0,
            advantage=0.0,
            counts=True,
            routing=MANY.pack(drawn(MANY, length - 1, seed=length)),
        )
        for length in (4, 2, 7)
    ]
    packed = end_to_end(sequences, 16, slice(1, 2), 3)
    assert packed.shape == (16, 1, 3) and packed.dtype == np.int16
    for start, sequence in zip((0, 4, 6), sequences, strict=True):
        read = len(sequence.tokens) - 1
        assert np.array_equal(packed[start : start + read], choices(sequence.routing)[:, 1:])
        assert (packed[start + read] == UNKNOWN).all()
    assert (packed[13:] == UNKNOWN).all()


def test_a_completion_says_nothing_unless_asked() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(TrainSequence)}
    assert fields["routing"] == NO_ROUTING
    assert compose(["experiment=tiny"]).algo.routing_replay is False
