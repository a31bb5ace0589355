"""The parts of a step's drift: which difference is which, and what is missing stays missing."""

from __future__ import annotations

import numpy as np
import pytest

from miles_lite.algo.drift_parts import drift_parts, flip_rate, spread, suspect
from miles_lite.algo.routing import RouterSizes
from miles_lite.protocols import Rescored, TokenValues
from miles_lite.types import NO_ROUTING, Completion, Finish, Group, Prompt, Routing, Sample, Verdict

PROMPT = Prompt("set:0", (1, 2), "text", "42", reward="", metadata={})
SIZES = RouterSizes(num_layers=2, top_k=2, num_experts=8)


def completion(*logprobs: float, version: int = 3, routing: Routing = NO_ROUTING) -> Completion:
    tokens = tuple(range(len(logprobs)))
    return Completion(tokens, logprobs, version, Finish.stop, routing)


def sample(*logprobs: float, version: int = 3, routing: Routing = NO_ROUTING) -> Sample:
    drawn = completion(*logprobs, version=version, routing=routing)
    return Sample(PROMPT, drawn, "", Verdict(0.0, ""))


def said(logprobs: dict[int, list[float]]) -> TokenValues:
    return {sample: np.array(values) for sample, values in logprobs.items()}


def test_the_parts_are_between_their_neighbours() -> None:
    """Means over samples of means over tokens: the short answer counts as much as the long one."""
    samples = {0: sample(-1.0), 7: sample(-1.0, -2.0)}
    prefilled = [completion(-1.3), completion(-1.1, -1.9)]
    trainer = said({0: [-1.3], 7: [-1.1, -2.1]})
    metrics = drift_parts(samples, Rescored(prefilled), trainer, version=3)
    assert metrics == pytest.approx(
        {
            "drift/version_gap": 0,
            "drift/decode_vs_prefill": (0.3 + 0.1) / 2,
            "drift/prefill_vs_trainer": (0 + 0.1) / 2,
            "drift/decode_vs_trainer": (0.3 + 0.1) / 2,
            "drift/decode_shift": (0.3 + 0) / 2,
            "drift/samples": 2,
        }
    )


def test_of_a_long_answer_what_was_scored_is_compared() -> None:
    samples, trainer = {0: sample(-1.0, -2.0, -9.0)}, said({0: [-1.2, -2.0, -3.0]})
    metrics = drift_parts(samples, Rescored([completion(-1.1, -2.0)]), trainer, version=3)
    assert metrics["drift/decode_vs_prefill"] == pytest.approx(0.05)
    assert metrics["drift/decode_vs_trainer"] == pytest.approx(0.1)


def test_what_was_not_measured_is_not_there() -> None:
    samples = {0: sample(-1.0), 1: sample(-1.0, version=2)}
    assert drift_parts({}, Rescored(), {}, version=3) == {}
    gap = {"drift/version_gap": 1}
    assert drift_parts(samples, Rescored(), said({0: [-1.0]}), version=3) == gap
    again = Rescored([completion(-1.0), completion(-1.5)])
    assert drift_parts(samples, again, {}, version=3) == gap
    metrics = drift_parts(samples, again, said({1: [-1.5]}), version=3)
    assert metrics["drift/decode_vs_prefill"] == 0.5


def test_what_truncation_and_temperature_make_of_it() -> None:
    """The engine told log-probs of what top-p kept: 0.5 too high. All of it is accounted for."""
    samples, trainer = {0: sample(-0.5, -1.5)}, said({0: [-1.0, -2.0]})
    rescored = Rescored(
        policy=[completion(-0.5, -1.5)],
        untempered=[completion(-1.5, -1.5)],
        truncated=[completion(0.0, -1.0)],
    )
    metrics = drift_parts(samples, rescored, trainer, version=3)
    assert metrics["drift/decode_vs_trainer"] == metrics["drift/prefill_vs_trainer"] == 0.5
    assert metrics["drift/truncation"] == 0.5 and metrics["drift/without_truncation"] == 0
    assert metrics["drift/temperature"] == 0.5  # 1 nat on one token
    assert metrics["drift/without_temperature"] == (1.5 + 0.5) / 2
    assert "top-p and top-k keep" in suspect(metrics)
    del metrics["drift/without_truncation"]
    assert "prefill disagrees with the trainer" in suspect(metrics)
    assert "temperature 1" in suspect(metrics | {"drift/without_temperature": 0.05})
    assert "do not depend on" in suspect(metrics | {"drift/temperature": 0.0})
    assert "its own prefill" in suspect(metrics | {"drift/decode_vs_prefill": 0.6})
    assert "3 versions apart" in suspect(metrics | {"drift/version_gap": 3.0})
    assert "versions" not in suspect(metrics | {"drift/version_gap": 0.0})
    assert suspect({}) == ""


def test_flips_are_counted_by_sets() -> None:
    ids = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    other = ids[..., ::-1].copy()  # the order means nothing
    assert flip_rate(SIZES.pack(ids), SIZES.pack(other)) == 0
    other[1, 0] = (4, 6)
    assert flip_rate(SIZES.pack(ids), SIZES.pack(other)) == 0.25
    assert flip_rate(SIZES.pack(ids), SIZES.pack(other[:1])) == 0  # the second was not scored
    flipped = sample(-1.0, routing=SIZES.pack(ids))
    again = Rescored([completion(-1.0, routing=SIZES.pack(other))])
    metrics = drift_parts({0: flipped}, again, {}, 3)
    assert metrics["drift/decode_prefill_flips"] == 0.25


def test_probes_are_spread_over_the_step() -> None:
    groups = [Group((sample(-1.0),) * 2)] * 5
    assert list(spread(groups, 4)) == [0, 2, 5, 7]
    assert list(spread(groups, 99)) == list(range(10))
    assert spread(groups, 0) == {} == spread([], 4)
