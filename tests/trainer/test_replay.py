"""Routing replay: a trainer forced to an engine's experts is transformers forced to them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_lite.algo.routing import RouterSizes
from miles_lite.config import AlgoConfig
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron import cpu_compat, model
from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.types import Routing, TrainSequence
from tests.forced import chosen, forced
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World
from tests.trainer.test_step import (
    ONE,
    OPTIM,
    Job,
    Trained,
    assert_same_step,
    dims,
    packed,
    plain_step,
    run,
    sequences,
    spec_of,
    train,
    transformers_model,
)

REPLAY = AlgoConfig(entropy_coef=0.01, routing_replay=True)
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
DRIFT = "train/train_rollout_logprob_abs_diff"
Result = tuple[Trained, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Samples:
    """The samples of test_step with the routing of transformers, and with flips in it."""

    agreeing: list[TrainSequence]
    flipped: list[TrainSequence]
    flip_rate: float  # of `flipped`: what routers would have chosen otherwise, (token, layer)
    sizes: RouterSizes = field(default_factory=lambda: RouterSizes(2, 3, 8))


@pytest.fixture(scope="module")
def samples(tiny: Tiny) -> Samples:
    draw, oracle = random.Random(3), transformers_model(tiny.folder)
    sizes = RouterSizes.of(NemotronH.from_folder(tiny.folder))
    agreeing, flipped, differ = [], [], []
    for sequence in sequences(16):
        choices = chosen(oracle, sequence.tokens)
        agreeing.append(replace(sequence, routing=sizes.pack(choices)))
        for token, layer in np.ndindex(choices.shape[:2]):
            if draw.random() < 0.2:
                others = set(range(sizes.num_experts)) - set(choices[token, layer].tolist())
                choices[token, layer, draw.randrange(sizes.top_k)] = draw.choice(sorted(others))
        flipped.append(replace(sequence, routing=sizes.pack(choices)))
        with forced(oracle, choices) as own, torch.no_grad():
            oracle(torch.tensor([sequence.tokens]))
        wanted = np.sort(torch.stack(own, 1)[:-1].numpy(), -1)
        if sequence.counts:  # what does not count costs no pass
            differ.append((wanted != np.sort(choices, -1)).any(-1).flatten())
    return Samples(agreeing, flipped, float(np.concatenate(differ).mean()), sizes)


def job(folder: Path, layout: ParallelDims, samples: list[TrainSequence], **changes: Any) -> Job:
    max_tokens = changes.pop("max_tokens", 100)
    spec: WorkerSpec = spec_of(folder, layout, **{"algo": REPLAY, **changes})
    return spec, [packed(samples, layout.dp, max_tokens=max_tokens)]


@pytest.fixture(scope="module")
def single(tiny: Tiny, samples: Samples) -> Result:
    """One process with flips in the routing."""
    return run([job(tiny.folder, ONE, samples.flipped)])[0]


def test_a_step_is_that_of_transformers_forced_to_the_same_experts(
    tiny: Tiny, samples: Samples, single: Result
) -> None:
    """Log-probs before, weights after two updates; the bias that only chooses is left alone."""
    trained, weights = single
    expected, old = plain_step(tiny.folder, packed(samples.flipped, 1))
    worst = max((float((weights[n] - w).abs().max()), n) for n, w in expected.items())
    assert worst[0] <= 1e-5, worst
    for sample, values in old.items():
        assert trained.logprobs[sample] == pytest.approx(values, abs=1e-5)
    assert trained.metrics["train/routing_flip_rate"] == pytest.approx(samples.flip_rate, abs=1e-9)
    before = load_file(tiny.folder / "model.safetensors")
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(torch.equal(weights[name], before[name]) for name in biases)
    unforced, _ = plain_step(tiny.folder, packed(sequences(16), 1))
    assert max(float((unforced[n] - w).abs().max()) for n, w in expected.items()) > 1e-3


def test_where_engine_and_trainer_agree_replay_changes_nothing(
    tiny: Tiny, samples: Samples, single: Result
) -> None:
    """At a learning rate of 0, for trained routers would not agree any more."""
    still, no_replay = replace(OPTIM, lr=0.0), replace(REPLAY, routing_replay=False)
    replayed, off, ignored = run(
        [
            job(tiny.folder, ONE, samples.agreeing, optim=still),
            job(tiny.folder, ONE, sequences(16), algo=no_replay, optim=still),
            job(tiny.folder, ONE, samples.flipped, algo=no_replay, optim=still),
        ]
    )
    assert replayed[0].metrics["train/routing_flip_rate"] == 0
    assert replayed[0].metrics[f"{DRIFT}_replayed"] == pytest.approx(
        replayed[0].metrics[f"{DRIFT}_no_replay"], abs=1e-6
    )
    names = set(replayed[0].metrics) - set(off[0].metrics)
    assert names == {
        "train/routing_flip_rate",
        f"{DRIFT}_replayed",
        f"{DRIFT}_no_replay",
        "perf/no_replay_time",
    }
    assert replayed[0].metrics["train/grad_norm"] > 0
    assert_same_step(replayed, off)
    assert_same_step(ignored, off)  # off is off
    with pytest.raises(AssertionError):
        assert_same_step((single[0], off[1]), off)


def test_packing_and_recomputation_change_nothing(
    tiny: Tiny, samples: Samples, single: Result
) -> None:
    """Recomputed routers take the choices once more, micro-batch by micro-batch."""
    spec, batches = job(tiny.folder, ONE, samples.flipped, max_tokens=41)
    recomputing = replace(spec, train=replace(spec.train, megatron=RECOMPUTED))
    for got in run([(spec, batches), (recomputing, batches)]):
        assert_same_step(got, single)


@pytest.mark.slow
def test_two_ranks_replay_as_one(tiny: Tiny, samples: Samples, single: Result) -> None:
    layouts = [dims(dp=2, ep=2), dims(tp=2, ep=2), dims(tp=2, expert_tp=2), dims(pp=2), dims(dp=2)]
    jobs = [job(tiny.folder, layout, samples.flipped, max_tokens=41) for layout in layouts]
    spec, batches = jobs[3]
    jobs.append((replace(spec, train=replace(spec.train, megatron=RECOMPUTED)), batches))
    for got in run(jobs):
        assert_same_step(got, single)
        assert got[0].metrics["train/routing_flip_rate"] == pytest.approx(samples.flip_rate)


@pytest.mark.slow
def test_eight_ranks_replay_as_one(tiny: Tiny, samples: Samples, single: Result) -> None:
    layout = dims(tp=2, pp=2, dp=2, ep=2)
    spec, batches = job(tiny.folder, layout, samples.flipped, max_tokens=41)
    recomputing = replace(spec, train=replace(spec.train, megatron=RECOMPUTED))
    for got in run([(spec, batches), (recomputing, batches)]):
        assert_same_step(got, single)


@pytest.mark.slow
def test_a_reference_routes_for_itself(tiny: Tiny, samples: Samples) -> None:
    """So with flips in the routing the KL to the start is not 0, and without it is."""
    algo = replace(REPLAY, kl_loss_coef=0.1)
    flipped, agreeing = run(
        [job(tiny.folder, ONE, s, algo=algo) for s in (samples.flipped, samples.agreeing)]
    )
    first = "rollout/ref_log_probs", "rollout/log_probs"
    assert agreeing[0].metrics[first[0]] == pytest.approx(agreeing[0].metrics[first[1]], abs=1e-6)
    assert abs(flipped[0].metrics[first[0]] - flipped[0].metrics[first[1]]) > 1e-3


def test_noise_in_the_routers_is_seen_and_its_drift_taken_away(
    tiny: Tiny, samples: Samples, tmp_path: Path
) -> None:
    """The engine's side is transformers; the trainer's bias is a little off, as if rounded."""
    _, engine = plain_step(tiny.folder, packed(samples.agreeing, 1))
    drawn = [replace(s, logprobs=tuple(engine.get(s.sample, s.logprobs))) for s in samples.agreeing]
    for file in tiny.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensor.add_(0.02 * torch.randn_like(tensor))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    metrics = run([job(tmp_path, ONE, drawn)])[0][0].metrics
    assert 0.005 < metrics["train/routing_flip_rate"] < 0.3
    assert metrics[DRIFT] < 1e-5 and metrics[f"{DRIFT}_replayed"] < 1e-5
    assert metrics[f"{DRIFT}_no_replay"] > 1e-3


# ------------------------------------------------------------------ refusals


def _repeated(routing: Routing) -> Routing:
    return replace(routing, experts=b"\3" * len(routing.experts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: replace(r, shape=(r.shape[0], 4, r.shape[2])),
            r"sample 3 cannot be replayed: the routing has shape \[\d+, 4, 3\]; "
            r"expected \[\d+, 2, 3\] \(tokens - 1, layers with experts, top k\)",
        ),
        (
            _repeated,
            r"sample 3 cannot be replayed: token 0 has experts \[3, 3, 3\] in layer 0 of those "
            r"with experts; expected 3 different ones of 0 .. 7",
        ),
        (
            lambda r: Routing(b"", (0, 0, 0), 1),
            r"sample 3 cannot be replayed: there is no routing; expected \[\d+, 2, 3\]",
        ),
    ],
    ids=["layers", "repeated", "absent"],
)
def test_what_cannot_be_replayed_is_refused_by_name(
    tiny: Tiny, samples: Samples, change: Any, message: str
) -> None:
    bad = [replace(s, routing=change(s.routing)) if s.sample == 3 else s for s in samples.agreeing]
    with pytest.raises(RuntimeError, match=message):
        run([job(tiny.folder, ONE, bad)])


def test_megatron_is_told_or_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_compat.install()
    from megatron.core import transformer

    sizes = NemotronH.from_folder(tiny.folder)
    make = partial(model.transformer_config, sizes, ONE, torch.float32)
    assert make({}, routing_replay=True).moe_enable_routing_replay
    assert not make({}).moe_enable_routing_replay
    with pytest.raises(ValueError, match="moe_router_fusion = True contradicts False.*replay"):
        make({"moe_router_fusion": True}, routing_replay=True)

    @dataclass
    class Old:
        num_layers: int = 1

    monkeypatch.setattr(transformer, "TransformerConfig", Old)
    with pytest.raises(ValueError, match=r"has no router replay, 0\.16\.1 and newer have"):
        make({}, routing_replay=True)


# ------------------------------------------------------------------ the tests have teeth


def _train_with_targets_of_the_next_rank(world: World, jobs: list[Job]) -> list[Trained]:
    """As `train`, but each TP rank takes the tokens of the other."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank
    from miles_lite.trainer.megatron import replay

    class Shifted:
        def __getattr__(self, name: str) -> Any:
            return getattr(parallel_state, name)

        def get_tensor_model_parallel_rank(self) -> int:
            return 1 - rank()

    replay.groups = Shifted()  # pyright: ignore
    return train(world, jobs)


def _train_recomputing_in_wrong_order(world: World, jobs: list[Job]) -> list[Trained]:
    """As `train`, but a recomputation takes the newest choices, not the oldest."""
    from miles_lite.trainer.megatron import replay

    class Newest(list):
        def pop(self, index: int = -1) -> Any:
            return super().pop(-1)

    init = replay.Replay.__init__

    def newest(self: Any, device: torch.device) -> None:
        init(self, device)
        self.replay_backward_list = Newest()

    replay.Replay.__init__ = newest
    replay.Replay.clear_indices = lambda self: self.replay_backward_list.clear()
    return train(world, jobs)


@pytest.mark.slow
def test_wrong_tokens_and_wrong_order_are_caught(
    tiny: Tiny, samples: Samples, single: Result
) -> None:
    (shifted,) = run(
        [job(tiny.folder, dims(tp=2, ep=2), samples.flipped)], _train_with_targets_of_the_next_rank
    )
    with pytest.raises(AssertionError):
        assert_same_step(shifted, single)
    spec, batches = job(tiny.folder, dims(pp=2), samples.flipped, max_tokens=41)
    spec = replace(spec, train=replace(spec.train, megatron=RECOMPUTED))
    with pytest.raises(RuntimeError, match="targets of another micro-batch"):
        run([(spec, batches)], _train_recomputing_in_wrong_order)
