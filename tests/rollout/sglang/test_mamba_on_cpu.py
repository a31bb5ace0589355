"""The torch versions of SGLang's Mamba kernels, against the formulas written out in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from miles_lite.rollout.sglang.cpu import mamba

H, P, G, N, C, W = 4, 3, 2, 5, 6, 4  # heads, channels of one, groups, state; convolved, width
LENS = (5, 1, 9)
UNUSED = 7.0  # what lies in cache slots


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spans() -> list[slice]:
    starts = list(itertools.accumulate(LENS, initial=0))
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


LOC = torch.tensor(list(itertools.accumulate(LENS, initial=0)))
WEIGHT, BIAS = randn(C, W, seed=1), randn(C, seed=2)


def convolved(x_T_C: Tensor, state_C: Tensor) -> Tensor:
    """[T, C] after `state_C` [C, W-1], tap by tap."""
    seen = torch.cat([state_C.T, x_T_C]).double()
    rows = [
        sum(seen[t + tap] * WEIGHT[:, tap].double() for tap in range(W)) for t in range(len(x_T_C))
    ]
    return torch.nn.functional.silu(torch.stack(rows) + BIAS.double())


@pytest.mark.parametrize("continued", [False, True])
def test_convolution(continued: bool) -> None:
    x, states = randn(sum(LENS), C, seed=3), randn(10, C, W - 1, seed=4)
    before, slots = states.clone(), torch.tensor([8, 2, 5], dtype=torch.int32)
    out = mamba.conv_prefill(
        x.T,
        WEIGHT,
        BIAS,
        conv_states=states,
        query_start_loc=LOC,
        cache_indices=slots,
        has_initial_state=torch.tensor([continued] * 3),
        activation="silu",
    ).T
    for span, slot in zip(spans(), slots.tolist(), strict=True):
        start = before[slot] if continued else torch.zeros(C, W - 1)
        torch.testing.assert_close(out[span].double(), convolved(x[span], start), atol=1e-5, rtol=0)
        assert torch.equal(states[slot], torch.cat([start.T, x[span]])[-(W - 1) :].T)
    others = [slot for slot in range(10) if slot not in slots.tolist()]
    assert torch.equal(states[others], before[others])
    # a token more, for the first two; the third is padding
    token, after = randn(3, C, seed=5), states.clone()
    out = mamba.conv_decode(
        token, states, WEIGHT, BIAS, "silu", conv_state_indices=torch.tensor([8, 2, -1])
    )
    for row, slot in enumerate((8, 2)):
        expected = convolved(token[row : row + 1], after[slot])[0]
        torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(states[slot], torch.cat([after[slot, :, 1:], token[row, :, None]], 1))
    rest = [slot for slot in range(10) if slot not in (8, 2)]
    assert torch.equal(states[rest], after[rest])


A, D, DT_BIAS = -randn(H, seed=6).exp(), randn(H, seed=7), randn(H, seed=8)


def recurred(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, P] and the last state [H, P, N], one number after the other."""
    h, ys = h.double().clone(), []
    dt = torch.nn.functional.softplus(dt.double() + DT_BIAS.double())
    for t in range(len(x)):
        y = torch.zeros(H, P, dtype=torch.float64)
        for head in range(H):
            group = head // (H // G)
            step = dt[t, head]
            h[head] *= torch.exp(step * A[head].double())
            h[head] += step * torch.outer(x[t, head].double(), B[t, group].double())
            y[head] = h[head] @ C[t, group].double() + D[head] * x[t, head].double()
        ys.append(y)
    return torch.stack(ys), h


@pytest.mark.parametrize("continued", [False, True])
def test_scan_and_one_step_more(continued: bool) -> None:
    num = sum(LENS)
    x, dt = randn(num, H, P, seed=10), randn(num, H, seed=11)
    B, C_ = randn(num, G, N, seed=12), randn(num, G, N, seed=13)
    initial = randn(len(LENS), H, P, N, seed=14)
    out = torch.full((1, num, H, P), UNUSED)
    _, states, _ = mamba.scan_prefill(
        x[None],
        dt[None],
        A,
        B[None],
        C_[None],
        D=D,
        dt_bias=DT_BIAS,
        cu_seqlens=LOC,
        initial_states=initial if continued else None,
        out=out,
        state_dtype=torch.float32,
    )
    for row, span in enumerate(spans()):
        start = initial[row] if continued else torch.zeros(H, P, N)
        y, state = recurred(x[span], dt[span], B[span], C_[span], start)
        torch.testing.assert_close(out[0, span].double(), y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[row].double(), state, atol=1e-5, rtol=1e-5)

    pool = torch.full((6, H, P, N), UNUSED)
    pool[[4, 1]] = states[:2]
    step = torch.full((3, H, P), UNUSED)
    mamba.scan_decode(
        pool,
        x[:3],
        dt[:3, :, None].expand(-1, -1, P),
        A[:, None, None].expand(-1, P, N),
        B[:3],
        C_[:3],
        D[:, None].expand(-1, P),
        dt_bias=DT_BIAS[:, None].expand(-1, P),
        state_batch_indices=torch.tensor([4, 1, -1]),
        out=step,
    )
    for row, slot in enumerate((4, 1)):
        one = slice(row, row + 1)
        y, state = recurred(x[one], dt[one], B[one], C_[one], states[row])
        torch.testing.assert_close(step[one].double(), y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pool[slot].double(), state, atol=1e-5, rtol=1e-5)
    assert (pool[[0, 2, 3, 5]] == UNUSED).all()
