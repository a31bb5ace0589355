"""The loss: against loops in float64, finite differences, and itself in another packing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_lite.algo import losses
from miles_lite.algo.losses import LogProbs, LossSettings, kl_estimate, policy_loss, responses
from miles_lite.algo.packing import Aggregation, pack
from miles_lite.types import Batch, MicroBatch, TrainSequence

ALL_TERMS = LossSettings(
    eps_clip=0.2,
    eps_clip_high=0.28,
    eps_clip_c=3.0,
    kl_loss_coef=0.1,
    kl_loss_type="low_var_kl",
    entropy_coef=0.05,
)


def loss_of_one_token(
    cur: float, old: float, ref: float, entropy: float, adv: float, s: LossSettings
) -> float:
    """The formulas once more, a token at a time."""
    ratio = math.exp(min(20.0, max(-20.0, cur - old)))
    clipped = min(max(ratio, 1 - s.eps_clip), 1 + s.eps_clip_high)
    loss = max(-ratio * adv, -clipped * adv)
    if s.eps_clip_c > 1 and adv < 0:
        loss = min(loss, -s.eps_clip_c * adv)
    x = cur - ref
    kl = {
        "k1": x,
        "k2": x * x / 2,
        "k3": math.exp(-x) - 1 + x,
        "low_var_kl": min(10.0, math.exp(-min(20.0, max(-20.0, x))) - 1 + min(20.0, x)),
    }[s.kl_loss_type]
    return loss + s.kl_loss_coef * kl - s.entropy_coef * entropy


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "expected", "clipped"),
    [
        (1.1, 2.0, 0.0, -2.2, 0),  # inside the range
        (1.5, 2.0, 0.0, -2.56, 1),  # clipped from above at 1.28
        (0.5, 2.0, 0.0, -1.0, 0),  # a good token that became rarer is not held back
        (0.5, -2.0, 0.0, 1.6, 1),  # clipped from below at 0.8
        (9.0, -2.0, 0.0, 18.0, 0),  # a bad token that became likelier costs without bound
        (9.0, -2.0, 3.0, 6.0, 0),  # ... but for the dual clip
        (9.0, 2.0, 3.0, -2.56, 1),  # which leaves good tokens alone
        (1.5, 0.0, 3.0, 0.0, 0),
    ],
)
def test_clipping_by_hand(
    ratio: float, advantage: float, dual: float, expected: float, clipped: int
) -> None:
    s = LossSettings(eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=dual)
    logprobs = LogProbs(current=torch.tensor([math.log(ratio) - 10]), old=torch.tensor([-10.0]))
    loss, metrics = policy_loss(logprobs, torch.tensor([advantage]), torch.tensor([0.5]), s)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)
    assert metrics["train/pg_loss"].item() == pytest.approx(expected / 2, rel=1e-5)
    assert metrics["train/pg_clipfrac"].item() == clipped / 2
    assert metrics["train/ppo_kl"].item() == pytest.approx(-math.log(ratio) / 2, rel=1e-4)


def test_the_exponent_is_bounded() -> None:
    logprobs = LogProbs(current=torch.tensor([-1.0]), old=torch.tensor([-200.0]))
    loss, _ = policy_loss(logprobs, torch.tensor([-1.0]), torch.ones(1), LossSettings())
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("dual", [0.0, 3.0])
def test_all_terms_against_loops_and_finite_differences(kind: losses.KlType, dual: float) -> None:
    s = dataclasses.replace(ALL_TERMS, kl_loss_type=kind, eps_clip_c=dual)
    rng = torch.Generator().manual_seed(0)
    n = 64
    old, ref, entropy, adv = torch.randn(4, n, generator=rng, dtype=torch.float64)
    cur = old + torch.randn(n, generator=rng, dtype=torch.float64)
    weights = torch.rand(n, generator=rng, dtype=torch.float64)

    def loss(current: Tensor, entropies: Tensor) -> Tensor:
        return policy_loss(LogProbs(current, old, ref, entropies), adv, weights, s)[0]

    columns = (x.tolist() for x in (cur, old, ref, entropy, adv))
    tokens = [loss_of_one_token(*row, s) for row in zip(*columns, strict=True)]
    expected = sum(w * x for w, x in zip(weights.tolist(), tokens, strict=True))
    assert loss(cur, entropy).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(loss, (cur.requires_grad_(), entropy.requires_grad_()))


def test_the_parts_add_up() -> None:
    old, ref, cur, entropy, adv = torch.randn(5, 16, dtype=torch.float64)
    weights = torch.rand(16, dtype=torch.float64)
    loss, metrics = policy_loss(LogProbs(cur, old, ref, entropy), adv, weights, ALL_TERMS)
    parts = {name: value.item() for name, value in metrics.items()}
    assert parts["train/loss"] == loss.item()
    assert parts["train/loss"] == pytest.approx(
        parts["train/pg_loss"]
        + ALL_TERMS.kl_loss_coef * parts["train/kl_loss"]
        - ALL_TERMS.entropy_coef * parts["train/entropy_loss"]
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_on_policy_is_plain_policy_gradient() -> None:
    """ratio = 1: no clipping, no KL, and d loss / d logp = -weight x advantage."""
    cur = torch.randn(8).requires_grad_()
    adv, weights = torch.randn(8), torch.rand(8)
    loss, metrics = policy_loss(LogProbs(cur, cur.detach()), adv, weights, LossSettings())
    loss.backward()
    assert cur.grad is not None
    torch.testing.assert_close(cur.grad, -weights * adv)
    assert metrics["train/ppo_kl"] == 0
    assert metrics["train/pg_clipfrac"] == 0


def test_kl_estimators_by_hand_and_in_expectation() -> None:
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    true_kl = (p * (p / q).log()).sum()
    for kind in ("k1", "k3", "low_var_kl"):  # unbiased; k2 is not
        assert (p * kl_estimate(p.log(), q.log(), kind)).sum() == pytest.approx(true_kl)
    x = torch.tensor([0.5])
    zero = torch.zeros(1)
    assert kl_estimate(x, zero, "k2").item() == 0.125
    assert kl_estimate(x, zero, "k3").item() == pytest.approx(math.exp(-0.5) - 0.5)
    assert kl_estimate(-100 * x, zero, "low_var_kl").item() == 10
    tiny = kl_estimate(torch.tensor([1e-4]), zero, "k3").item()
    assert tiny == pytest.approx(5e-9, rel=1e-3)  # e^-x - 1 + x in float32 would be off by 100 %


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["current", "old", "reference"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_broken_logprob_breaks_loss_and_gradient(
    side: str, broken: float, advantage: float
) -> None:
    values = {name: torch.full((4,), -1.0) for name in ("current", "old", "reference")}
    values[side][2] = broken
    current = values.pop("current").requires_grad_()
    s = dataclasses.replace(ALL_TERMS, entropy_coef=0.0)
    loss, metrics = policy_loss(
        LogProbs(current, **values), torch.full((4,), advantage), torch.full((4,), 0.25), s
    )
    loss.backward()
    assert loss.isnan()
    assert metrics["train/loss"].isnan()
    assert metrics["train/nonfinite_logprobs"] == 1
    assert current.grad is not None
    assert current.grad.isnan().tolist() == [False, False, True, False]


def test_terms_without_their_inputs_are_refused() -> None:
    logprobs = LogProbs(torch.zeros(1), torch.zeros(1))
    for s in (LossSettings(kl_loss_coef=0.1), LossSettings(entropy_coef=0.1)):
        with pytest.raises(AssertionError, match="needs"):
            policy_loss(logprobs, torch.zeros(1), torch.zeros(1), s)
    with pytest.raises(AssertionError, match="dual clip"):
        policy_loss(logprobs, torch.zeros(1), torch.zeros(1), LossSettings(eps_clip_c=0.5))


# ------------------------------------------------------------------ from packed sequences

VOCAB = 7  # of a bigram model: the logits of a position depend on its token alone


def drawn(lengths: list[tuple[int, int]], seed: int) -> list[TrainSequence]:
    rng = torch.Generator().manual_seed(seed)
    return [
        TrainSequence(
            tuple(torch.randint(VOCAB, (prompt + response,), generator=rng).tolist()),
            prompt,
            tuple((torch.rand(response, generator=rng, dtype=torch.float64) - 3).tolist()),
            torch.randn(1, generator=rng).item(),
            sample,
        )
        for sample, (prompt, response) in enumerate(lengths)
    ]


def loss_by_loops(
    sequences: Sequence[TrainSequence], table: Tensor, old: Tensor, aggregation: str
) -> float:
    """One update, straight from the definition; old = log-probs table of the old policy."""
    logprobs = table.log_softmax(-1)
    means, sums, count = [], [], 0
    for s in sequences:
        tokens = []
        for t in range(s.prompt_len, len(s.tokens)):
            pair = s.tokens[t - 1], s.tokens[t]
            p = logprobs[pair[0]].exp()
            entropy = -(p * p.log()).sum().item()
            cur, before = logprobs[pair].item(), old[pair].item()
            tokens.append(loss_of_one_token(cur, before, before, entropy, s.advantage, ALL_TERMS))
        means.append(sum(tokens) / max(1, len(tokens)))
        sums.append(sum(tokens))
        count += max(1, len(tokens))
    return sum(means) / len(means) if aggregation == "sample" else sum(sums) / count


def update_losses(batch: Batch, table: Tensor, old: Tensor) -> tuple[list[float], Tensor]:
    """([updates] loss, gradient of their sum), summed over micro-batches and ranks."""
    table = table.clone().requires_grad_()
    values = []
    for update in batch.updates:
        total = 0.0
        for micro_batch in (mb for rank in update.micro_batches for mb in rank):
            loss, metrics = micro_batch_loss(micro_batch, table, old)
            loss.backward()
            total += loss.item()
            assert metrics["train/nonfinite_logprobs"] == 0
        values.append(total)
    assert table.grad is not None
    return values, table.grad


def micro_batch_loss(
    micro_batch: MicroBatch, table: Tensor, old: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    stream = torch.tensor([token for s in micro_batch.sequences for token in s.tokens])
    flat = losses.responses(micro_batch)
    logprobs = table[stream].log_softmax(-1)[flat.logit_index]  # [N, V]
    before = old[stream][flat.logit_index]
    pick = flat.targets[:, None]
    current, old_picked = (x.gather(1, pick)[:, 0] for x in (logprobs, before))
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return policy_loss(
        LogProbs(current, old_picked, old_picked, entropy),
        flat.advantages.double(),
        flat.weights.double(),
        ALL_TERMS,
    )


def tables() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    table, old = torch.randn(2, VOCAB, VOCAB, generator=rng, dtype=torch.float64)
    return table, old.log_softmax(-1)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=12, max_size=12),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(1, 60),
    st.sampled_from(["sample", "token"]),
)
def test_loss_and_gradient_do_not_depend_on_packing(
    lengths: list[tuple[int, int]], dp: int, max_tokens: int, aggregation: Aggregation
) -> None:
    sequences = drawn(lengths, seed=3)
    table, old = tables()
    kwargs = {"global_batch": 6, "hard_cap": 14, "aggregation": aggregation}
    packed = pack(sequences, dp=dp, max_tokens=max_tokens, **kwargs)
    alone = pack(sequences, dp=1, max_tokens=1, **kwargs)
    values, grad = update_losses(packed, table, old)
    expected, expected_grad = update_losses(alone, table, old)
    assert values == pytest.approx(expected, rel=1e-6)  # the weights are float32
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    by_loops = [loss_by_loops(sequences[i : i + 6], table, old, aggregation) for i in (0, 6)]
    assert values == pytest.approx(by_loops, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_offset_by_one_would_be_seen(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above rests on: a wrong mask or offset does change the loss."""
    sequences = drawn([(3, 4), (2, 5), (4, 1), (2, 2)], seed=5)
    table, old = tables()
    batch = pack(sequences, dp=2, global_batch=4, max_tokens=20, hard_cap=20, aggregation="sample")
    expected = loss_by_loops(sequences, table, old, "sample")
    assert update_losses(batch, table, old)[0] == pytest.approx([expected], rel=1e-5)

    def shifted(micro_batch: MicroBatch) -> losses.Responses:
        flat = responses(micro_batch)
        return dataclasses.replace(flat, logit_index=flat.logit_index + shift)

    monkeypatch.setattr(losses, "responses", shifted)
    assert update_losses(batch, table, old)[0] != pytest.approx([expected], rel=1e-2)


def test_responses_by_hand() -> None:
    first = TrainSequence((1, 2, 3, 4, 5), 3, (-0.1, -0.2), 0.5, 0)
    empty = TrainSequence((6, 6), 2, (), 0.25, 1)
    last = TrainSequence((7, 8, 9), 1, (-0.3, -0.4), -1.0, 2)
    flat = responses(MicroBatch((first, empty, last), (0.5, 0.0, 0.125)))
    assert flat.logit_index.tolist() == [2, 3, 7, 8]
    assert flat.targets.tolist() == [4, 5, 8, 9]
    assert flat.advantages.tolist() == [0.5, 0.5, -1.0, -1.0]
    assert flat.weights.tolist() == [0.5, 0.5, 0.125, 0.125]
    assert flat.rollout_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert flat.lengths == (2, 0, 2)


def test_a_micro_batch_of_empty_answers_has_zero_loss() -> None:
    flat = responses(MicroBatch((TrainSequence((1, 2), 2, (), 0.0, 0),), (0.0,)))
    assert flat.targets.numel() == flat.logit_index.numel() == 0
    current = torch.randn(2, VOCAB, requires_grad=True)[flat.logit_index].sum(-1)
    loss, metrics = policy_loss(
        LogProbs(current, torch.zeros(0)), flat.advantages, flat.weights, LossSettings()
    )
    loss.backward()  # a rank with nothing to learn still takes part in the backward pass
    assert loss.item() == 0
    assert metrics["train/nonfinite_logprobs"] == 0


def test_a_response_needs_a_prompt() -> None:
    with pytest.raises(AssertionError, match="sample 4: no prompt"):
        responses(MicroBatch((TrainSequence((1, 2), 0, (-1.0, -1.0), 0.0, 4),), (1.0,)))
