"""The loss: against closed formulas, and itself in another packing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from miles_lite.algo import losses
from miles_lite.algo.losses import LogProbs, LossSettings, kl_estimate, policy_loss, responses
from miles_lite.config import AlgoConfig, CorrectionConfig
from miles_lite.metrics import Mean, Partial, Sum, finish, merge
from miles_lite.types import MicroBatch, TrainSequence

ALL_TERMS = LossSettings(
    eps_clip_c=3.0, kl_loss_coef=0.1, kl_loss_type="low_var_kl", entropy_coef=0.05
)
ICEPOP = CorrectionConfig(weight="token", low=0.5, outside="mask")
REJECT = CorrectionConfig(reject="geometric", veto=0.1)


def unread(old: Tensor) -> Tensor:
    """Engine log-probs that nothing may look at while no correction is active."""
    return torch.full_like(old, torch.nan)


def plain(current: Tensor, old: Tensor, *others: Tensor) -> LogProbs:
    return LogProbs(current, old, unread(old), *others)


def test_settings_are_those_of_the_configuration() -> None:
    assert LossSettings.of(AlgoConfig()) == LossSettings()
    algo = AlgoConfig(policy_loss="gspo", kl_loss_coef=0.5, correction=ICEPOP)
    expected = LossSettings(policy_loss="gspo", kl_loss_coef=0.5, correction=ICEPOP)
    assert LossSettings.of(algo) == expected


# ------------------------------------------------------------------ closed formulas


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
    logprobs = plain(torch.tensor([math.log(ratio) - 10]), torch.tensor([-10.0]))
    loss, partials = policy_loss(logprobs, torch.tensor([advantage]), torch.tensor([0.5]), (1,), s)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)
    assert finish(partials) == pytest.approx(
        {
            "train/loss": expected / 2,
            "train/pg_loss": expected / 2,
            "train/pg_clipfrac": clipped,
            "train/ppo_kl": -math.log(ratio),
            "train/ois": ratio,
            "train/nonfinite_logprobs": 0,
        },
        rel=1e-4,
    )


def test_the_exponent_is_bounded() -> None:
    logprobs = plain(torch.tensor([-1.0]), torch.tensor([-200.0]))
    loss, _ = policy_loss(logprobs, torch.tensor([-1.0]), torch.ones(1), (1,), LossSettings())
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo"])
def test_on_policy_is_plain_policy_gradient(policy: str) -> None:
    """ratio = 1: no clipping, no KL, a value of -A, and d loss / d logp = -weight x advantage."""
    cur = torch.randn(8, dtype=torch.float64).requires_grad_()
    adv = torch.tensor([2.0] * 3 + [-1.0] * 5, dtype=torch.float64)
    weights = torch.tensor([0.2] * 3 + [0.1] * 5, dtype=torch.float64)
    s = LossSettings(policy_loss=policy)
    loss, partials = policy_loss(plain(cur, cur.detach()), adv, weights, (3, 5), s)
    loss.backward()
    assert cur.grad is not None
    torch.testing.assert_close(cur.grad, -weights * adv)
    value = cur.detach() if policy == "cispo" else torch.ones(8)
    assert loss.item() == pytest.approx((-weights * adv * value).sum().item())
    metrics = finish(partials)
    assert metrics["train/ppo_kl"] == metrics["train/pg_clipfrac"] == 0
    assert metrics["train/ois"] == 1


def random_tokens(num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(old, current with gradient, advantages, weights)"""
    rng = torch.Generator().manual_seed(4)
    old, moved, adv = torch.randn(3, num_tokens, generator=rng, dtype=torch.float64)
    weights = torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    return old, (old + 0.3 * moved).requires_grad_(), adv, weights


def test_gspo_of_one_token_responses_is_ppo() -> None:
    old, cur, adv, weights = random_tokens(12)
    results = []
    for policy in ("ppo_clip", "gspo"):
        s = dataclasses.replace(LossSettings(), policy_loss=policy, eps_clip_c=1.5)
        loss, partials = policy_loss(plain(cur, old), adv, weights, (1,) * 12, s)
        results.append((*torch.autograd.grad(loss, cur), partials))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert 0 < finish(results[0][1])["train/pg_clipfrac"] < 1


def test_gspo_moves_all_tokens_of_a_sequence_alike() -> None:
    """s = exp(mean log-ratio): d (-s A) / d logp_t = -s A / T, and nothing where s is clipped."""
    old = torch.full((5,), -1.0, dtype=torch.float64)
    cur = (old + torch.tensor([0.3, -0.1, 0.1, 2.0, 0.0])).requires_grad_()
    adv = torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    s = LossSettings(policy_loss="gspo")
    loss, partials = policy_loss(plain(cur, old), adv, torch.ones_like(adv), (3, 2), s)
    loss.backward()
    assert cur.grad is not None
    assert cur.grad.tolist() == pytest.approx([-2 * math.exp(0.1)] * 3 + [0.0] * 2)
    assert loss.item() == pytest.approx(-6 * math.exp(0.1) - 2 * 1.28)
    assert finish(partials)["train/pg_clipfrac"] == pytest.approx(2 / 5)


def test_cispo_is_reinforce_with_bounded_weights() -> None:
    """Gradient -min(ratio, 1.28) A: that of REINFORCE times the ratio, also where PPO has none."""
    old, cur, adv, weights = random_tokens(12)
    ratio = (cur.detach() - old).exp()
    assert ratio.min() < 0.8 and ratio.max() > 1.28
    for eps_clip, low in ((0.2, 0.8), (5.0, 0.0)):  # over 1: open from below
        s = LossSettings(policy_loss="cispo", eps_clip=eps_clip)
        loss, partials = policy_loss(plain(cur, old), adv, weights, (12,), s)
        (grad,) = torch.autograd.grad(loss, cur)
        torch.testing.assert_close(grad, -weights * adv * ratio.clamp(low, 1.28))
        outside = (ratio < low) | (ratio > 1.28)
        clipfrac = (weights * outside).sum() / weights.sum()
        assert finish(partials)["train/pg_clipfrac"] == pytest.approx(clipfrac.item())


@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo"])
def test_bad_sequences_left_behind_are_masked(policy: str) -> None:
    advantages = [[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -2.0]]
    drops = [[0.5, 0.1], [0.5, 0.5], [0.5, 0.0], [0.3, 0.3]]  # of the log-prob: d
    old = torch.full((8,), -2.0, dtype=torch.float64)
    cur = (old - torch.tensor(drops).flatten()).requires_grad_()
    s = LossSettings(policy_loss=policy, eps_clip=0.5, opsm_delta=0.28, kl_loss_coef=1.0)
    adv = torch.tensor(advantages, dtype=torch.float64).flatten()
    weights = torch.full((8,), 0.01, dtype=torch.float64)
    flat = plain(cur, old, cur.detach() + 1)
    loss, partials = policy_loss(flat, adv, weights, (2, 2, 2, 2), s)
    loss.backward()
    unmasked = dataclasses.replace(s, opsm_delta=0.0)
    (grad,) = torch.autograd.grad(policy_loss(flat, adv, weights, (2,) * 4, unmasked)[0], cur)
    kl_alone = dataclasses.replace(unmasked, correction=CorrectionConfig())
    (kl_grad,) = torch.autograd.grad(
        policy_loss(flat, 0 * adv, weights, (2,) * 4, kl_alone)[0], cur
    )
    assert cur.grad is not None
    masked = torch.tensor([True, True] + [False] * 4 + [True, True])  # a mean of A < 0 counts
    torch.testing.assert_close(cur.grad, torch.where(masked, kl_grad, grad))
    assert (grad != kl_grad).all()
    assert finish(partials)["train/opsm_clipfrac"] == pytest.approx(0.5)


# ------------------------------------------------------------------ KL


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
    assert kl_estimate(-4 * x, zero, "low_var_kl", torch.tensor([9.0])).item() == 10
    tiny = kl_estimate(torch.tensor([1e-4]), zero, "k3").item()
    assert tiny == pytest.approx(5e-9, rel=1e-3)  # e^-x - 1 + x in float32 would be off by 100 %


def test_the_bounded_kl_has_a_gradient_where_the_other_overflows() -> None:
    for kind, finite in (("k3", False), ("low_var_kl", True)):
        current = torch.tensor([-200.0], requires_grad=True)
        (grad,) = torch.autograd.grad(kl_estimate(current, torch.zeros(1), kind).sum(), current)
        assert grad.isfinite().all() == finite


@pytest.mark.parametrize("kind", ["k1", "k3", "low_var_kl"])
def test_unbiased_kl_is_unbiased_in_value_and_gradient(kind: losses.KlType) -> None:
    """Every token of a small vocabulary, weighted by how often the old policy draws it."""
    rng = torch.Generator().manual_seed(2)
    logits, old, ref = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    old, ref = old.log_softmax(-1), ref.log_softmax(-1)
    current = logits.requires_grad_().log_softmax(-1)
    exact = (current.exp() * (current - ref)).sum()
    zeros = torch.zeros(5, dtype=torch.float64)
    found = {}
    for unbiased in (True, False):
        s = LossSettings(kl_loss_coef=1.0, kl_loss_type=kind, use_unbiased_kl=unbiased)
        loss, _ = policy_loss(plain(current, old, ref), zeros, old.exp(), (5,), s)
        found[unbiased] = (loss, *torch.autograd.grad(loss, logits, retain_graph=True))
    expected = (exact, *torch.autograd.grad(exact, logits))
    torch.testing.assert_close(found[True], expected)
    assert (found[False][1] - expected[1]).abs().max() > 0.01


# ------------------------------------------------------------------ metrics and errors


def test_the_parts_add_up() -> None:
    old, ref, cur, entropy, adv = torch.randn(5, 16, dtype=torch.float64)
    weights = torch.rand(16, dtype=torch.float64)
    loss, partials = policy_loss(plain(cur, old, ref, entropy), adv, weights, (16,), ALL_TERMS)
    parts = finish(partials)
    assert parts["train/loss"] == loss.item()
    assert parts["train/loss"] == pytest.approx(
        parts["train/pg_loss"]
        + ALL_TERMS.kl_loss_coef * parts["train/kl_loss"]
        - ALL_TERMS.entropy_coef * parts["train/entropy_loss"]
    )


def test_token_entropy_is_nats_a_token_whatever_the_weights() -> None:
    """Dr.GRPO's weights add up to the length over a constant, RLOO's to the length, and less where
    sequences are spared: as sums of the loss they would tell of 0.29, 7 or 0.07 nats."""
    zeros, entropy = torch.zeros(10), torch.full((10,), 0.7)
    entropy[6:] = 5.0  # of a sequence that is not trained on
    for weight in (1 / 24, 1.0, 0.01):
        weights = torch.tensor([weight] * 6 + [0.0] * 4)
        logprobs = LogProbs(zeros, zeros, unread(zeros), entropy=entropy)
        _, partials = policy_loss(logprobs, zeros, weights, (6, 4), LossSettings())
        assert partials["train/token_entropy"].finish() == pytest.approx(0.7)
        assert partials["train/entropy_loss"].finish() == pytest.approx(6 * weight * 0.7)
    assert partials["train/token_entropy"] == Mean(pytest.approx(4.2), 6.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["current", "old", "reference", "rollout"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("correction", [ICEPOP, REJECT])
def test_a_broken_logprob_breaks_loss_and_gradient(
    side: str, broken: float, advantage: float, policy: str, correction: CorrectionConfig
) -> None:
    values = {name: torch.full((4,), -1.0) for name in ("current", "old", "reference", "rollout")}
    values[side][2] = broken
    current = values.pop("current").requires_grad_()
    s = dataclasses.replace(
        ALL_TERMS,
        policy_loss=policy,
        entropy_coef=0.0,
        opsm_delta=0.1,
        correction=correction,
    )
    loss, partials = policy_loss(
        LogProbs(current, **values), torch.full((4,), advantage), torch.full((4,), 0.25), (2, 2), s
    )
    loss.backward()
    assert loss.isnan()
    assert math.isnan(partials["train/loss"].finish())
    assert partials["train/nonfinite_logprobs"] == Sum(1)
    assert current.grad is not None
    assert current.grad[2].isnan()
    assert not current.grad[:2].isnan().any()  # of another sequence


def test_terms_without_their_inputs_are_refused() -> None:
    logprobs, zero = plain(torch.zeros(1), torch.zeros(1)), torch.zeros(1)
    for s in (LossSettings(kl_loss_coef=0.1), LossSettings(entropy_coef=0.1)):
        with pytest.raises(AssertionError, match="needs"):
            policy_loss(logprobs, zero, zero, (1,), s)
    with pytest.raises(AssertionError, match="dual clip"):
        policy_loss(logprobs, zero, zero, (1,), LossSettings(eps_clip_c=0.5))


# ------------------------------------------------------------------ from packed sequences

VOCAB = 7  # of a bigram model: the logits of a position depend on its token alone
PACKED = dataclasses.replace(ALL_TERMS, policy_loss="gspo", opsm_delta=0.1, correction=REJECT)


def drawn(lengths: Sequence[tuple[int, int]], seed: int) -> list[TrainSequence]:
    rng = torch.Generator().manual_seed(seed)
    return [
        sequence(
            torch.randint(VOCAB, (prompt + response,), generator=rng).tolist(),
            prompt,
            (torch.rand(response, generator=rng, dtype=torch.float64) - 3).tolist(),
            torch.randn(1, generator=rng).item(),
            sample,
        )
        for sample, (prompt, response) in enumerate(lengths)
    ]


def sequence(
    tokens: Sequence[int],
    prompt_len: int,
    logprobs: Sequence[float],
    advantage: float,
    sample: int = 0,
) -> TrainSequence:
    return TrainSequence(
        tokens=tuple(tokens),
        prompt_len=prompt_len,
        logprobs=tuple(logprobs),
        sample=sample,
        group=0,
        reward=0.0,
        advantage=advantage,
        counts=True,
    )


def tables() -> tuple[Tensor, Tensor]:
    """Logits by token of the policy, and log-probs of the old one."""
    rng = torch.Generator().manual_seed(1)
    table, old = torch.randn(2, VOCAB, VOCAB, generator=rng, dtype=torch.float64)
    return table, old.log_softmax(-1)


def trained(
    parts: Sequence[Sequence[TrainSequence]], s: LossSettings
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of the sequences, each part of them a micro-batch."""
    table, old = tables()
    table.requires_grad_()
    num_sequences = sum(map(len, parts))
    total, told = 0.0, []
    for part in parts:
        weights = tuple(1 / (num_sequences * max(1, each.response_len)) for each in part)
        loss, partials = micro_batch_loss(MicroBatch(tuple(part), weights), table, old, s)
        loss.backward()
        total += loss.item()
        told.append(partials)
    assert table.grad is not None
    return total, table.grad, finish(merge(*told))


def micro_batch_loss(
    micro_batch: MicroBatch, table: Tensor, old: Tensor, s: LossSettings
) -> tuple[Tensor, dict[str, Partial]]:
    stream = torch.tensor([token for each in micro_batch.sequences for token in each.tokens])
    flat = losses.responses(micro_batch)
    logprobs = table[stream].log_softmax(-1)[flat.logit_index]  # [N, V]
    before = old[stream][flat.logit_index]
    current, old_picked = (x.gather(1, flat.targets[:, None])[:, 0] for x in (logprobs, before))
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return policy_loss(
        LogProbs(current, old_picked, flat.rollout_logprobs.double(), old_picked, entropy),
        flat.advantages.double(),
        flat.weights.double(),
        flat.lengths,
        s,
    )


@examples(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=6, max_size=6),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.sampled_from([ALL_TERMS, PACKED]),
)
def test_loss_gradient_and_metrics_do_not_depend_on_packing(
    lengths: list[tuple[int, int]], places: list[int], s: LossSettings
) -> None:
    sequences = drawn(lengths, seed=3)
    parts = [
        [each for each, at in zip(sequences, places, strict=True) if at == i] for i in range(4)
    ]
    packed = trained([part for part in parts if part], s)
    alone = trained([[each] for each in sequences], s)
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)  # the weights are float32
    torch.testing.assert_close(packed[1], alone[1], rtol=1e-5, atol=1e-7)
    assert packed[2] == pytest.approx(alone[2], rel=1e-5, abs=1e-7, nan_ok=True)


def by_token(sequences: Sequence[TrainSequence]) -> float:
    """The on-policy loss straight from the definition: mean over samples of mean over tokens."""
    table, _ = tables()
    logprobs = table.log_softmax(-1)
    means = []
    for s in sequences:
        pairs = [(s.tokens[t - 1], s.tokens[t]) for t in range(s.prompt_len, len(s.tokens))]
        means.append(sum(-s.advantage * logprobs[pair].item() for pair in pairs) / len(pairs))
    return sum(means) / len(means)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_the_logits_of_a_token_lie_one_to_its_left(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = drawn([(3, 4), (2, 5), (4, 1), (2, 2)], seed=5)
    s = LossSettings(policy_loss="cispo", eps_clip=1e-9, eps_clip_high=1e-9)  # ratio 1: A x logp

    def shifted(micro_batch: MicroBatch) -> losses.Responses:
        flat = responses(micro_batch)
        return dataclasses.replace(flat, logit_index=flat.logit_index + shift)

    monkeypatch.setattr(losses, "responses", shifted)
    same = trained([sequences[:1], sequences[1:]], s)[0] == pytest.approx(
        by_token(sequences), rel=1e-5
    )
    assert same == (shift == 0)


def test_responses_by_hand() -> None:
    first = sequence((1, 2, 3, 4, 5), 3, (-0.1, -0.2), 0.5)
    empty = sequence((6, 6), 2, (), 0.25)
    last = sequence((7, 8, 9), 1, (-0.3, -0.4), -1.0)
    flat = responses(MicroBatch((first, empty, last), (0.5, 0.0, 0.125)))
    assert flat.logit_index.tolist() == [2, 3, 7, 8]
    assert flat.targets.tolist() == [4, 5, 8, 9]
    assert flat.advantages.tolist() == [0.5, 0.5, -1.0, -1.0]
    assert flat.weights.tolist() == [0.5, 0.5, 0.125, 0.125]
    assert flat.rollout_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert flat.lengths == (2, 0, 2)


@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo"])
def test_a_micro_batch_of_empty_answers_has_zero_loss(policy: str) -> None:
    flat = responses(MicroBatch((sequence((1, 2), 2, (), 0.0),), (0.0,)))
    assert flat.targets.numel() == flat.logit_index.numel() == 0
    current = torch.randn(2, VOCAB, requires_grad=True)[flat.logit_index].sum(-1)
    s = dataclasses.replace(PACKED, policy_loss=policy, kl_loss_coef=0.0, entropy_coef=0.0)
    loss, partials = policy_loss(
        LogProbs(current, torch.zeros(0), torch.zeros(0)), flat.advantages, flat.weights, (0,), s
    )
    loss.backward()  # a rank with nothing to learn still takes part in the backward pass
    assert loss.item() == 0
    assert partials["train/nonfinite_logprobs"] == Sum(0)


def test_a_response_needs_a_prompt() -> None:
    with pytest.raises(AssertionError, match="sample 4: no prompt"):
        responses(MicroBatch((sequence((1, 2), 0, (-1.0, -1.0), 0.0, sample=4),), (1.0,)))
