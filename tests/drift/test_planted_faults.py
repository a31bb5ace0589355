"""Faults planted in a live engine or trainer, and what the drift is put down to."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from miles_lite.algo.drift_parts import drift_parts, suspect
from miles_lite.config import AlgoConfig
from miles_lite.drift.causes import ROUNDING, Cause, Evidence, Recorded, attribute, gap
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Metrics, Phase, Rescored
from miles_lite.types import MicroBatch, Prompt, Sample, Sampling, Verdict
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World, run_ranks
from tests.trainer.test_step import OPTIM, dims, spec_of

SAMPLING = Sampling(
    seed=3, max_new_tokens=24, temperature=0.8, top_p=1.0, top_k=0, stop_token_ids=()
)
PROMPT = (5, 9, 3, 77, 20, 41, 8)


@dataclass
class Seen:
    causes: list[Cause]
    evidence: Evidence

    @property
    def names(self) -> list[str]:
        return [cause.name for cause in self.causes]


Plant = Callable[[Any], Any]  # given the sides, a context in which the fault is there


@contextmanager
def _rounded_bias(sides: Any) -> Iterator[None]:
    """A sync that sends the correction bias as bf16."""
    biases = [name for name in sides.engine.model.weights if "bias" in name and "correct" in name]
    assert biases, list(sides.engine.model.weights)[:20]
    with _changed(sides, biases, lambda x: x.bfloat16().float()):
        yield


@contextmanager
def _one_tensor(sides: Any) -> Iterator[None]:
    with _changed(sides, ["layers.3.o_proj"], lambda x: x * 1.1):
        yield


@contextmanager
def _changed(sides: Any, names: list[str], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    weights = sides.engine.model.weights
    before = {name: weights[name].clone() for name in names}
    for name in names:
        weights[name].copy_(change(weights[name]))
    try:
        yield
    finally:
        for name, value in before.items():
            weights[name].copy_(value)


@contextmanager
def _lost_scaling_factor(sides: Any) -> Iterator[None]:
    model, right = sides.engine.model, sides.engine.model.config
    model.config = replace(right, routed_scaling_factor=1.0)
    try:
        yield
    finally:
        model.config = right


@contextmanager
def _bf16_bias_in_the_router(sides: Any) -> Iterator[None]:
    """Stored right, but rounded where it is added."""
    from miles_lite.rollout.embedded import model

    def rounding(u: Tensor, gate: Tensor, bias: Tensor, sizes: Any) -> Any:
        return good(u, gate, (bias * 8).round() / 8, sizes)  # coarser than bf16: few tokens here

    good = model.route
    with mock.patch.object(model, "route", rounding):
        yield


@contextmanager
def _dt_clamp(sides: Any, in_decode: bool = True) -> Iterator[None]:
    from miles_lite.rollout.embedded import mamba

    prefill, decode = mamba.scan_prefill, mamba.scan_decode

    def clamped_prefill(x: Tensor, dt: Tensor, *rest: Any) -> Any:
        return prefill(x, torch.where(dt > 0, dt.clamp(min=0.1), dt), *rest)

    def clamped_decode(state: Tensor, x: Tensor, dt: Tensor, *rest: Any) -> Any:
        return decode(state, x, dt.clamp(min=0.1), *rest)

    with mock.patch.object(mamba, "scan_prefill", clamped_prefill):
        if not in_decode:
            yield
            return
        with mock.patch.object(mamba, "scan_decode", clamped_decode):
            yield


@contextmanager
def _dt_clamp_in_prefill(sides: Any) -> Iterator[None]:
    """As transformers does."""
    with _dt_clamp(sides, in_decode=False):
        yield


@contextmanager
def _mamba_leaks(sides: Any) -> Iterator[None]:
    from megatron.core.ssm import mamba_mixer

    good = mamba_mixer.mamba_split_conv1d_scan_combined

    def leaking(*args: Any, seq_idx: Any = None, **kwargs: Any) -> Any:
        return good(*args, **kwargs)

    with mock.patch.object(mamba_mixer, "mamba_split_conv1d_scan_combined", leaking):
        yield


@contextmanager
def _top_p_unaccounted(sides: Any) -> Iterator[None]:
    """Log-probs of what was drawn from, not of the policy."""
    from miles_lite.rollout.embedded import serve
    from miles_lite.rollout.embedded.sampler import kept

    good = serve.draw

    def renormalised(logits: Tensor, samplings: Any, positions: Any, given: Any = None) -> Any:
        tokens, logprobs = good(logits, samplings, positions, given)
        probs = (logits / samplings[0].temperature).softmax(-1)
        return tokens, logprobs - (probs * kept(probs, samplings)).sum(-1).log()

    with mock.patch.object(serve, "draw", renormalised):
        yield


@contextmanager
def _log_probs_at_temperature_1(sides: Any) -> Iterator[None]:
    from miles_lite.rollout.embedded import serve

    good = serve.draw

    def plain(logits: Tensor, samplings: Any, positions: Any, given: Any = None) -> Any:
        tokens, _ = good(logits, samplings, positions, given)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    with mock.patch.object(serve, "draw", plain):
        yield


FAULTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "rounded bias": (_rounded_bias, {}),
    "one tensor": (_one_tensor, {}),
    "scaling factor": (_lost_scaling_factor, {}),
    "router": (_bf16_bias_in_the_router, {}),
    "dt clamp": (_dt_clamp, {}),
    "dt clamp in prefill": (_dt_clamp_in_prefill, {}),
    "leak": (_mamba_leaks, {}),
    "top-p": (_top_p_unaccounted, {"top_p": 0.7}),
    "temperature": (_log_probs_at_temperature_1, {}),
}


def _all(world: World, folder: Path) -> bytes:
    """Pickled: tensors themselves would go through memory that ends with this process."""
    from miles_lite.drift.examine import Sides, as_sequence, control, examine
    from miles_lite.models.nemotron_h import NemotronH
    from miles_lite.rollout.embedded.options import EngineOptions
    from miles_lite.rollout.embedded.rank import EngineRank
    from miles_lite.trainer.megatron.worker import MegatronWorker

    model = NemotronH.from_folder(folder)
    engine = EngineRank(model, EngineDims(1, 1, 1), 0, EngineOptions(max_running=4, max_seq_len=64))
    engine.connect("")
    engine.load_hf(folder)
    engine.set_version(0)
    engine.enter(Phase.generate)
    spec = spec_of(folder, dims(), algo=AlgoConfig(routing_replay=True))
    worker = MegatronWorker(replace(spec, optim=replace(OPTIM, lr=0.0)), 0)
    worker.setup(f"127.0.0.1:{next(world._next)}")
    worker.enter(Phase.train)
    sides = Sides(engine, worker, trainer_version=0)

    def look(**changes: Any) -> Seen:
        evidence = examine(sides, PROMPT, replace(SAMPLING, **changes))
        return Seen(attribute(evidence, ROUNDING["fp32"]), evidence)

    def parts(**changes: Any) -> Metrics:
        """As a step of a run splits it."""
        policy = replace(SAMPLING, **changes)
        drawn = sides.ask(PROMPT, policy, ())
        trained = worker.score([MicroBatch((as_sequence(PROMPT, drawn),), (1.0,))])
        scoring = replace(policy, max_new_tokens=len(drawn.tokens))
        kinds = (scoring, replace(scoring, temperature=1.0), replace(scoring, truncated=True))
        rescored = Rescored(*([sides.ask(PROMPT, kind, drawn.tokens)] for kind in kinds))
        sample = Sample(Prompt("", PROMPT, "", "", "", {}), drawn, "", Verdict(0.0, ""))
        return drift_parts({0: sample}, rescored, trained, 0)

    found: dict[str, Any] = {"nothing": look(), "top-p right": look(top_p=0.7)}
    answer = sides.ask(PROMPT, replace(SAMPLING, wants_routing=True), ())
    found["control"] = control(sides, PROMPT, answer)
    for name, (plant, changes) in FAULTS.items():
        with plant(sides):
            found[name] = look(**changes)
    found["parts"] = {"nothing": parts(top_p=0.7)}
    for name in ("top-p", "temperature", "dt clamp in prefill", "scaling factor"):
        with FAULTS[name][0](sides):
            found["parts"][name] = parts(top_p=0.7)
    found["nothing again"] = look()
    # an update that the engine does not get: once told, once with its version counted all the same
    for param in (p for p in map(worker.tensor, {h.param for h in worker.hosted()})):
        if param.requires_grad:
            param.data.add_(1e-3 * torch.randn_like(param))
    found["stale, committed"] = look()
    sides.trainer_version = 1
    found["stale"] = look()
    engine.close()
    return pickle.dumps(found)


@pytest.fixture(scope="module")
def found(tiny: Tiny) -> dict[str, Any]:
    told = pickle.loads(run_ranks(1, _all, tiny.folder)[0])
    for name, seen in told.items():
        print(name, seen.causes if isinstance(seen, Seen) else seen)
    return told


def test_without_a_fault_there_is_rounding_only(found: dict[str, Any]) -> None:
    for name in ("nothing", "nothing again", "top-p right"):
        assert found[name].names == ["rounding"], found[name].causes
        assert found[name].causes[0].size < 1e-4
        assert max(layer.max for layer in found[name].evidence.layers) < 1e-4


def test_a_learning_rate_of_zero_leaves_all_as_it_was(found: dict[str, Any]) -> None:
    assert found["control"] == (0, 0.0)


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("rounded bias", "weights rounded to bf16 on one side", "2 of "),
        ("one tensor", "tensors not synced", "1 of "),
        ("scaling factor", "prefill against trainer: E", "layer 1 (experts"),
        ("router", "routing", "from layer 1 on"),
        ("dt clamp", "prefill against trainer: M", "layer 0 (Mamba"),
        ("dt clamp in prefill", "prefill against trainer: M", "layer 0 (Mamba"),
        ("leak", "leaked state between packed documents", ""),
        ("top-p", "sampling truncation", "decoded and prefilled log-probs are those of what"),
        ("temperature", "temperature", "of temperature 1, not 0.8"),
        ("stale", "stale weights", "1 versions behind"),
        ("stale, committed", "stale weights", " tensors differ"),
    ],
)
def test_a_fault_is_put_down_to_its_part(
    found: dict[str, Any], fault: str, name: str, words: str
) -> None:
    cause = next((c for c in found[fault].causes if c.name == name and words in c.evidence), None)
    assert cause, found[fault].causes
    others = {other.name for other in found[fault].causes} - {name}
    # a clamp in one of the engine's kernels is seen between them, too
    assert others <= ({"decode against prefill"} if fault == "dt clamp in prefill" else set())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("top-p", "those among the tokens that top-p and top-k keep"),
        ("temperature", "do not depend on the temperature"),
        ("dt clamp in prefill", "decoding disagrees with its own prefill"),
        ("scaling factor", "prefill disagrees with the trainer"),
    ],
)
def test_the_parts_of_a_step_say_where_to_look(
    found: dict[str, Any], fault: str, words: str
) -> None:
    assert words in suspect(found["parts"][fault]), found["parts"][fault]


def test_sizes_of_truncation_and_temperature_in_a_step(found: dict[str, Any]) -> None:
    parts = found["parts"]["nothing"]
    assert parts["drift/decode_vs_trainer"] < 1e-4
    assert parts["drift/truncation"] == pytest.approx(parts["drift/without_truncation"], rel=0.01)
    assert parts["drift/truncation"] > 0.05 and parts["drift/temperature"] > 0.05
    assert found["parts"]["top-p"]["drift/without_truncation"] < 1e-4


def test_names_of_tensors(found: dict[str, Any]) -> None:
    (cause,) = found["one tensor"].causes
    assert "layers.3.mixer.o_proj.weight" in cause.evidence
    for tensor in found["rounded bias"].evidence.tensors:
        assert tensor.name.endswith("gate.e_score_correction_bias")


def test_what_a_top_p_costs_is_the_mass_it_leaves(found: dict[str, Any]) -> None:
    evidence = found["top-p"].evidence
    assert gap(evidence.decoded + evidence.log_kept, evidence.trained) < 1e-4
    assert found["top-p"].causes[0].size == pytest.approx(
        -float(evidence.log_kept.mean()), rel=0.01
    )


ENGINE, TRAINER = (f"weights or settings of the run's {side}" for side in ("engine", "trainer"))


@pytest.mark.parametrize(
    ("engine", "trainer", "name", "changes"),
    [
        (0.0, 0.0, "rounding", {}),
        (0.1, 0.0, ENGINE, {}),
        (math.nan, 0.0, ENGINE, {}),
        (0.0, 0.1, TRAINER, {}),
        (2e-4, 0.0, "rounding", {"alarm": 0.05}),
        (2e-4, 0.0, ENGINE, {"alarm": 1e-4}),
        (0.0, 0.0, "not reproduced: engine or trainer of the run", {"drift": 0.5}),  # further on
        # of the step before: an update lies between
        (0.3, 0.3, "rounding", {"same_weights": False}),
        (0.5, 0.01, ENGINE, {"same_weights": False}),
        (0.01, 0.5, TRAINER, {"same_weights": False}),
        (0.3, 0.4, "not reproduced: engine or trainer of the run", {"same_weights": False}),
    ],
)
def test_what_a_run_recorded_is_held_against_its_checkpoint(
    found: dict[str, Any], engine: float, trainer: float, name: str, changes: dict[str, Any]
) -> None:
    """Its engine missed an update, then, or was set up otherwise: this one was not."""
    sound = found["nothing"].evidence
    then = sound.prefilled + engine, sound.trained + trainer
    run = Recorded(
        drift=gap(*then),
        engine=(then[0], sound.prefilled),
        trainer=(then[1], sound.trained),
        step=3,
        same_weights=True,
        alarm=0.05,
    )
    seen = replace(sound, recorded=replace(run, **changes))
    assert [cause.name for cause in attribute(seen, ROUNDING["fp32"])] == [name]


def test_a_number_that_is_none_is_no_rounding(found: dict[str, Any]) -> None:
    sound = found["nothing"].evidence
    broken = replace(sound, trained=sound.trained * math.nan)
    causes = attribute(broken, ROUNDING["fp32"])
    assert causes[0].size == math.inf and "rounding" not in [cause.name for cause in causes]


def test_routes_that_flip_behind_a_wrong_layer_are_no_cause_of_their_own(
    found: dict[str, Any],
) -> None:
    for fault in ("scaling factor", "dt clamp"):
        assert any(layer.flips for layer in found[fault].evidence.layers)
    assert max(layer.mean for layer in found["router"].evidence.layers) < 1e-4  # replayed
