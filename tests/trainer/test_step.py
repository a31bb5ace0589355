"""A training step of the worker: the same weights at every layout, and the loss of plain torch."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_lite.algo.packing import Aggregation, PackSettings, pack
from miles_lite.algo.routing import choices
from miles_lite.config import AlgoConfig, OptimConfig, TrainConfig
from miles_lite.metrics import finish, merge
from miles_lite.parallel import ParallelDims
from miles_lite.protocols import Phase
from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.types import Batch, TrainSequence
from miles_lite.weights.table import iter_segments
from tests.forced import forced
from tests.trainer.conftest import Tiny
from tests.trainer.ranks import World, run_ranks

TEMPERATURE = 0.8


def dims(tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1, expert_tp: int = 1) -> ParallelDims:
    return ParallelDims(tp=tp, pp=pp, dp=dp, ep=ep, expert_tp=expert_tp)


Job = tuple[WorkerSpec, list[Batch]]  # the batches of its steps
ONE = dims()
# Adam divides by the gradient's own size: a large eps keeps it from blowing rounding up to lr
OPTIM = OptimConfig(lr=1e-2, beta2=0.95, eps=1e-3, weight_decay=0.1, clip_grad=0.5)


@dataclass(frozen=True)
class Trained:
    """What one rank reports of a step."""

    metrics: dict[str, float]
    logprobs: dict[int, list[float]]
    entropies: dict[int, list[float]]
    rows: list[tuple[str, int, int, Any]]  # tensor, dim, start, numpy rows after the step
    held: dict[str, dict[str, int]]  # phase -> kind -> bytes
    broken: str = ""


def sequences(num: int, vocab: int = 128) -> list[TrainSequence]:
    draw = random.Random(7)
    made = []
    for sample in range(num):
        length, prompt_len = draw.randint(6, 40), draw.randint(1, 5)
        made.append(
            TrainSequence(
                tokens=tuple(draw.randrange(vocab) for _ in range(length)),
                prompt_len=prompt_len,
                logprobs=tuple(-4 + draw.gauss(0, 0.1) for _ in range(length - prompt_len)),
                sample=sample,
                group=sample // 4,
                reward=float(draw.randrange(3)),
                advantage=draw.gauss(0, 1),
                counts=sample != 5,
            )
        )
    return made


def batch_for(dp: int, aggregation: Aggregation = "sample", max_tokens: int = 100) -> Batch:
    return packed(sequences(16), dp, aggregation, max_tokens)


def packed(
    samples: list[TrainSequence],
    dp: int,
    aggregation: Aggregation = "sample",
    max_tokens: int = 100,
) -> Batch:
    return pack(
        samples,
        PackSettings(
            dp=dp,
            global_batch=8,  # two updates: the second one is off-policy
            max_tokens=max_tokens,
            aggregation=aggregation,
            aggregation_constant=20.0,
            train_zero_advantage=True,
            cost=lambda num_tokens: num_tokens,
        ),
    )


def spec_of(folder: Path, layout: ParallelDims, **changes: Any) -> WorkerSpec:
    spec = WorkerSpec(
        model_path=folder,
        dtype="fp32",
        device="cpu",
        dims=layout,
        train=TrainConfig(num_steps=1, global_batch=8, logprob_chunk_tokens=16, timeout_s=60),
        optim=OPTIM,
        algo=AlgoConfig(entropy_coef=0.01),
        temperature=TEMPERATURE,
        sync_timeout_s=60,
        seed=0,
    )
    return replace(spec, **changes)


def train(world: World, jobs: list[Job]) -> list[Trained]:
    """Each job in turn on the ranks of this world; what its last step reports."""
    from miles_lite.trainer.megatron import setup
    from miles_lite.trainer.megatron.worker import MegatronWorker

    done = []
    for port, (spec, batches) in zip(world.ports, jobs, strict=False):
        worker = MegatronWorker(spec, world.rank)
        worker.setup(f"127.0.0.1:{port}")
        held = {phase.value: worker.enter(phase) for phase in (Phase.generate, Phase.train)}
        dp_rank = spec.dims.dp_rank(world.rank)
        shares = [[update.micro_batches[dp_rank] for update in b.updates] for b in batches]
        report = [worker.step(share) for share in shares][-1]
        rows = [
            (tensor, h.dim, start, worker._weights[h.param].detach().narrow(h.dim, off, n).numpy())
            for h in worker.hosted()
            for tensor, start, off, n in iter_segments(h)
        ]
        said = report.partials, report.logprobs, report.entropies
        done.append(Trained(*said, rows, held, report.broken))  # pyright: ignore
        setup.destroy()
    return done


def train_with_wrong_backward(world: World, jobs: list[Job]) -> list[Trained]:
    """As `train`, but the last layer's gradient comes out 5 % too large."""
    from miles_lite.trainer.megatron import logprob

    right: Any = logprob._LinearLogprob.backward

    def wrong(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight, *rest = right(ctx, *grads)
        return grad_hidden, grad_weight * 1.05, *rest

    logprob._LinearLogprob.backward = staticmethod(wrong)
    return train(world, jobs)


def train_scored_first(world: World, jobs: list[Job]) -> list[Trained]:
    """As `train`, with a pass of its own for the log-probs before a single update, too."""
    AlgoConfig.scores_first = property(lambda self: True)
    return train(world, jobs)


def run(jobs: list[Job], fn: Any = train) -> list[tuple[Trained, dict[str, torch.Tensor]]]:
    """(merged report, whole HF tensors) of each job; all jobs have one world size."""
    size = jobs[0][0].dims.world_size
    by_rank = run_ranks(size, fn, jobs, deadline_s=300)
    results = []
    for index in range(len(jobs)):
        ranks = [by_rank[r][index] for r in range(size)]
        metrics = finish(merge(*(r.metrics for r in ranks)))
        logprobs = {k: v for r in ranks for k, v in r.logprobs.items()}
        entropies = {k: v for r in ranks for k, v in r.entropies.items()}
        (broken,) = {r.broken for r in ranks}  # all say the same
        merged = Trained(metrics, logprobs, entropies, [], ranks[0].held, broken)
        results.append((merged, assemble([row for r in ranks for row in r.rows])))
    return results


def assemble(rows: list[tuple[str, int, int, Any]]) -> dict[str, torch.Tensor]:
    """Whole tensors from everybody's rows; replicas must agree to the bit."""
    found: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
    for tensor, dim, start, values in rows:
        mine, values = found.setdefault((tensor, dim), {}), torch.from_numpy(values)
        if start in mine and mine[start].shape == values.shape:
            assert torch.equal(mine[start], values), f"replicas of {tensor} differ"
        mine[start] = values
    return {
        tensor: torch.cat([pieces[start] for start in sorted(pieces)], dim)
        for (tensor, dim), pieces in found.items()
    }


@pytest.fixture(scope="module")
def single(tiny: Tiny) -> tuple[Trained, dict[str, torch.Tensor]]:
    return run([(spec_of(tiny.folder, ONE), [batch_for(1)])])[0]


def assert_same_step(
    got: tuple[Trained, dict[str, torch.Tensor]],
    wanted: tuple[Trained, dict[str, torch.Tensor]],
    tolerance: float = 1e-5,
) -> None:
    assert got[1].keys() == wanted[1].keys()
    worst = max((float((got[1][n] - w).abs().max()), n) for n, w in wanted[1].items())
    assert worst[0] <= tolerance, worst
    for name, value in wanted[0].metrics.items():
        # replay is compared with none on a part of the tokens, which depends on the layout
        if not name.startswith("perf/") and not name.endswith(("_replayed", "_no_replay")):
            assert got[0].metrics[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert got[0].logprobs.keys() >= wanted[0].logprobs.keys()  # the spared may keep company
    for sample, values in wanted[0].logprobs.items():
        assert got[0].logprobs[sample] == pytest.approx(values, abs=1e-4)
        assert got[0].entropies[sample] == pytest.approx(wanted[0].entropies[sample], abs=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one(tiny: Tiny, single: Any) -> None:
    layouts = [dims(dp=2, ep=2), dims(tp=2, ep=2), dims(tp=2, expert_tp=2), dims(pp=2), dims(dp=2)]
    jobs = [(spec_of(tiny.folder, layout), [batch_for(layout.dp)]) for layout in layouts]
    for got in run(jobs):
        assert_same_step(got, single)


@pytest.mark.slow
def test_eight_ranks_train_as_one(tiny: Tiny, single: Any) -> None:
    layout = dims(tp=2, pp=2, dp=2, ep=2)
    (got,) = run([(spec_of(tiny.folder, layout), [batch_for(2)])])
    assert_same_step(got, single)


def test_one_rank_steps_as_plain_torch(tiny: Tiny, single: Any) -> None:
    """transformers, the closed formula of the loss, and torch's own AdamW."""
    trained, weights = single
    expected, old = plain_step(tiny.folder, batch_for(1))
    worst = max((float((weights[n] - w).abs().max()), n) for n, w in expected.items())
    assert worst[0] <= 1e-5, worst
    for sample, values in old.items():
        assert trained.logprobs[sample] == pytest.approx(values, abs=1e-4)
    model = transformers_model(tiny.folder)  # entropies are those of before the first update, too
    for s in batch_for(1).sequences:
        entropies = logprob_entropy(model, s)[1].tolist()
        assert trained.entropies[s.sample] == pytest.approx(entropies, abs=1e-4)
    drift = [
        abs(a - b)
        for s in batch_for(1).sequences
        for a, b in zip(old[s.sample], s.logprobs, strict=True)
    ]
    assert set(old) == set(range(16)) - {5}  # what does not count costs no pass
    assert trained.metrics["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(
        max(drift), abs=1e-3
    )


def test_the_only_update_of_a_step_tells_the_log_probs_before_it(tiny: Tiny) -> None:
    """To the bit what a pass of its own tells, without that pass."""
    job = (spec_of(tiny.folder, ONE), [packed(sequences(8), 1)])
    ((own, weights),) = run([job])
    ((first, expected),) = run([job], train_scored_first)
    assert first.metrics["perf/log_probs_time"] > 100 * own.metrics["perf/log_probs_time"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for told, wanted in ((own.logprobs, first.logprobs), (own.entropies, first.entropies)):
        assert {k: list(v) for k, v in told.items()} == {k: list(v) for k, v in wanted.items()}
    counted = {k: v for k, v in first.metrics.items() if not k.startswith("perf/")}
    assert {k: own.metrics[k] for k in counted} == counted


def test_a_wrong_backward_pass_is_caught(tiny: Tiny, single: Any) -> None:
    (got,) = run([(spec_of(tiny.folder, ONE), [batch_for(1)])], train_with_wrong_backward)
    with pytest.raises(AssertionError):
        assert_same_step(got, single)
    worst = max(float((got[1][n] - w).abs().max()) for n, w in single[1].items())
    assert worst > 1e-5


def test_packing_and_lr_zero(tiny: Tiny, single: Any) -> None:
    """More micro-batches change nothing; a learning rate of 0 changes no weight at all."""
    spec = spec_of(tiny.folder, ONE)
    still = replace(spec, optim=replace(OPTIM, lr=0.0))
    many, none = run([(spec, [batch_for(1, max_tokens=41)]), (still, [batch_for(1)])])
    assert_same_step(many, single)
    loaded = _hf_weights(tiny.folder)
    for name, tensor in none[1].items():
        assert torch.equal(tensor, loaded[name]), name


def test_an_update_without_any_verdict(tiny: Tiny) -> None:
    """As when a reward service is down: it trains on nothing, and the other update still trains."""
    made = [replace(s, counts=s.sample >= 8) for s in sequences(16)]
    ((trained, weights),) = run([(spec_of(tiny.folder, ONE), [packed(made, 1)])])
    diffs = [
        statistics.fmean(
            abs(a - b) for a, b in zip(trained.logprobs[s.sample], s.logprobs, strict=True)
        )
        for s in made[8:]
    ]
    drift = trained.metrics["train/train_rollout_logprob_abs_diff"]
    assert drift == pytest.approx(statistics.fmean(diffs), rel=1e-4)
    loaded = _hf_weights(tiny.folder)
    assert any(not torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("advantage", "metric", "said"),
    [
        (math.nan, "train/loss", "a loss is NaN"),
        (1e38, "train/grad_norm", "gradient norm is (nan|inf) at update 0"),
    ],
)
def test_what_is_not_finite_changes_no_weight_and_is_told(
    tiny: Tiny, advantage: float, metric: str, said: str
) -> None:
    """With log-probs, drift and the culprit, so that it can be looked into."""
    made = [replace(s, advantage=advantage) if s.sample == 0 else s for s in sequences(16)]
    layout = dims(dp=2, ep=2)
    ((trained, weights),) = run([(spec_of(tiny.folder, layout), [packed(made, 2)])])
    assert re.search(said, trained.broken)
    assert not math.isfinite(trained.metrics[metric])
    assert trained.metrics["train/train_rollout_logprob_abs_diff"] < 10
    assert len(trained.logprobs) >= 15  # all that count; the spared may keep company
    loaded = _hf_weights(tiny.folder)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


def test_memory_of_phases(single: Any) -> None:
    held = single[0].held
    assert held["generate"]["grads"] == 0
    assert held["train"]["grads"] > 0
    assert held["train"]["weights"] == held["generate"]["weights"]


@pytest.mark.slow
def test_offloaded_optimizer_and_frozen_reference(tiny: Tiny, single: Any) -> None:
    """CPU offload is the same maths. A KL to the start is 0 at first and then pulls back."""
    spec = spec_of(tiny.folder, dims(dp=2, ep=2))
    offload = replace(spec, optim=replace(OPTIM, cpu_offload=True))
    kl = replace(spec, algo=replace(spec.algo, kl_loss_coef=0.1))
    offloaded, pulled = run([(offload, [batch_for(2)]), (kl, [batch_for(2)])])
    assert_same_step(offloaded, single)
    assert 0 < pulled[0].metrics["train/kl_loss"] < 1
    assert any(
        not torch.allclose(pulled[1][name], tensor, atol=1e-6) for name, tensor in single[1].items()
    )


# ------------------------------------------------------------------ token-level credit

PAID = 0.5  # kl_coef; after one step the KL to the start is about 0.01 nats a token


def paid_returns(batch: Batch, old: BySample, reference: BySample) -> BySample:
    """REINFORCE++: reward at the end less the KL still to come, whitened over all that counts."""
    tokens = {}
    for s in batch.sequences:
        kl = (old[s.sample] - reference[s.sample]).tolist()
        to_come = [sum(kl[t:]) for t in range(len(kl))]
        tokens[s.sample] = torch.tensor([s.advantage - PAID * rest for rest in to_come])
    counting = torch.cat([tokens[s.sample] for s in batch.sequences if s.counts])
    mean, std = counting.mean(), counting.std()
    return {sample: (values - mean) / std for sample, values in tokens.items()}


def paid_groups(batch: Batch, old: BySample, reference: BySample) -> BySample:
    """RLOO: each reward less its sequence's KL, against the mean of the others of its group."""
    paid: dict[int, dict[int, float]] = {}
    for s in batch.sequences:
        if s.counts:
            kl = float((old[s.sample] - reference[s.sample]).sum())
            paid.setdefault(s.group, {})[s.sample] = s.reward - PAID * kl
    value = {}
    for members in paid.values():
        for sample, reward in members.items():
            others = [r for other, r in members.items() if other != sample]
            value[sample] = reward - statistics.fmean(others)
    return {
        s.sample: torch.full_like(old[s.sample], value.get(s.sample, 0.0)) for s in batch.sequences
    }


KL_IN_REWARD = {
    "reinforce_plus_plus": (
        AlgoConfig(
            advantage_estimator="reinforce_plus_plus",
            whiten=True,
            kl_coef=PAID,
            kl_loss_type="k1",
            entropy_coef=0.01,
        ),
        paid_returns,
    ),
    "rloo": (
        AlgoConfig(advantage_estimator="rloo", kl_coef=PAID, kl_loss_type="k1", entropy_coef=0.01),
        paid_groups,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KL_IN_REWARD)
def test_kl_in_the_reward_and_whitening_as_plain_torch_and_on_two_ranks(
    tiny: Tiny, name: str
) -> None:
    """Two steps, for in the first the KL to the start is 0. Groups lie across the two ranks."""
    algo, credit = KL_IN_REWARD[name]
    one = (spec_of(tiny.folder, ONE, algo=algo), [batch_for(1)] * 2)
    two = (spec_of(tiny.folder, dims(dp=2, ep=2), algo=algo), [batch_for(2)] * 2)
    (alone,) = run([one])
    (split,) = run([two])
    assert_same_step(split, alone)
    expected, _ = plain_step(tiny.folder, batch_for(1), num_steps=2, credit=credit)
    worst = max((float((alone[1][n] - w).abs().max()), n) for n, w in expected.items())
    assert worst[0] <= 2e-5, worst
    unpaid, _ = plain_step(tiny.folder, batch_for(1), num_steps=2)
    assert max(float((unpaid[n] - w).abs().max()) for n, w in expected.items()) > 1e-3


# ------------------------------------------------------------------ the independent way


def _hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _on_disk(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers' names and stacked experts -> those of the checkpoint."""
    name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
    if ".experts." in name and tensor.dim() == 3:
        stem, kind = name.rsplit(".", 1)
        return {f"{stem}.{e}.{kind}.weight": piece for e, piece in enumerate(tensor)}
    return {name: tensor}


BySample = dict[int, torch.Tensor]  # [T] of the response
Credit = Callable[[Batch, BySample, BySample], BySample]  # from old and reference log-probs


def given_advantages(batch: Batch, old: BySample, reference: BySample) -> BySample:
    return {s.sample: torch.full_like(old[s.sample], s.advantage) for s in batch.sequences}


def transformers_model(folder: Path) -> Any:
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def logprob_entropy(model: Any, s: TrainSequence) -> tuple[torch.Tensor, torch.Tensor]:
    with forced(model, choices(s.routing) if s.routing.known else None):
        logits = model(torch.tensor([s.tokens])).logits[0].float() / TEMPERATURE
    logp = logits.log_softmax(-1)[s.prompt_len - 1 : -1]
    targets = torch.tensor(s.tokens[s.prompt_len :])
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def plain_step(
    folder: Path, batch: Batch, num_steps: int = 1, credit: Credit = given_advantages
) -> tuple[dict[str, torch.Tensor], dict[int, list[float]]]:
    """Steps of two updates in one process: (weights after, old log-probs of the last step), one
    sequence at a time, forced to the experts of its routing. The reference is the start."""
    model = transformers_model(folder)

    # Megatron exempts biases and 1-D parameters from weight decay
    flat = [p for n, p in model.named_parameters() if p.dim() == 1]
    rest = [p for n, p in model.named_parameters() if p.dim() > 1]
    adam = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    reference: BySample = {}
    old = reference
    for _ in range(num_steps):
        with torch.no_grad():
            old = {s.sample: logprob_entropy(model, s)[0] for s in batch.sequences}
        reference = reference or old
        advantages = credit(batch, old, reference)
        for update in batch.updates:
            members = [s for rank in update.micro_batches for mb in rank for s in mb.sequences]
            counting = [s for s in members if s.counts]
            adam.zero_grad()
            for s in counting:
                logp, entropy = logprob_entropy(model, s)
                ratio, a = (logp - old[s.sample]).exp(), advantages[s.sample]
                pg = -torch.minimum(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.28) * a)
                ((pg - 0.01 * entropy).mean() / len(counting)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad)
            adam.step()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        weights |= _on_disk(name, tensor)
    return weights, {k: v.tolist() for k, v in old.items()}
