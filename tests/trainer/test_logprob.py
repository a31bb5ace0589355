"""linear_logprob against full log_softmax: values, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from miles_lite.parallel import ParallelDims
from miles_lite.trainer.megatron.logprob import linear_logprob
from tests.trainer.ranks import World, run_ranks

T, H, V = 37, 16, 48


def _inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "hidden": torch.randn(T, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "targets": torch.randint(0, V, (T,)),
        "grads": torch.randn(2, T),
    }


def _truth(x: dict[str, torch.Tensor], temperature: float) -> tuple[torch.Tensor, ...]:
    """Values [2, T] and the gradients of hidden and weight, computed in fp64."""
    hidden, weight = (x[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    chosen = logp.gather(1, x["targets"][:, None])[:, 0]
    out = torch.stack((chosen, -(logp.exp() * logp).sum(-1)))
    grads = torch.autograd.grad(out, (hidden, weight), x["grads"].double())
    return tuple(t.detach().float() for t in (out, *grads))


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To 1e-6 of the largest value."""
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_rank(chunk: int, temperature: float) -> None:
    x = _inputs()
    expected, grad_hidden, grad_weight = _truth(x, temperature)
    out = linear_logprob(x["hidden"], x["weight"], x["targets"], temperature, chunk, None)
    _assert_close(torch.stack(out), expected)
    torch.autograd.backward(out, tuple(x["grads"]))
    _assert_close(x["hidden"].grad, grad_hidden)
    _assert_close(x["weight"].grad, grad_weight)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_gradients(which: int) -> None:
    x = _inputs()
    x["grads"][1 - which] = 0
    _, grad_hidden, _ = _truth(x, 1.0)
    out = linear_logprob(x["hidden"], x["weight"], x["targets"], 1.0, 8, None)
    out[which].backward(x["grads"][which])
    _assert_close(x["hidden"].grad, grad_hidden)


def test_gradcheck() -> None:
    """Finite differences, in fp64: the formula, not torch's log_softmax, is the witness.

    Inside, logits are fp32, hence the coarse step and tolerance.
    """
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (5,))

    def f(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return linear_logprob(hidden, weight, targets, 0.9, 2, None)

    assert torch.autograd.gradcheck(f, (hidden, weight), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_extreme_logits_stay_finite() -> None:
    hidden = (1e3 * torch.randn(6, H)).requires_grad_()
    weight = torch.randn(V, H, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.randint(0, V, (6,)), 0.1, 4, None)
    (out[0].sum() + out[1].sum()).backward()
    assert torch.stack(out).isfinite().all() and hidden.grad.isfinite().all()
    assert (out[1] > -1e-3).all(), "an entropy below zero"


def test_no_tokens() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.long), 1.0, 4, None)
    out[0].sum().backward()
    assert out[0].shape == (0,) and not weight.grad.any()


class _Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_never_exist_whole() -> None:
    tokens, vocab, width, chunk = 512, 1024, 8, 32
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with _Largest() as largest:
        logprobs, entropy = linear_logprob(hidden, weight, targets, 1.0, chunk, None)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.numel == chunk * vocab


def _two_ranks(world: World) -> None:
    with world.layout(ParallelDims(tp=2, pp=1, dp=1, ep=1, expert_tp=2)):
        for temperature, chunk in ((1.0, 10), (0.7, 1000)):
            x = _inputs()
            expected, grad_hidden, grad_weight = _truth(x, temperature)
            weight = x["weight"].detach().chunk(2)[world.rank].clone().requires_grad_()
            out = linear_logprob(
                x["hidden"], weight, x["targets"], temperature, chunk, dist.group.WORLD
            )
            _assert_close(torch.stack(out), expected)
            torch.autograd.backward(out, tuple(x["grads"]))
            dist.all_reduce(x["hidden"].grad)
            _assert_close(x["hidden"].grad, grad_hidden)
            mine = grad_weight.chunk(2)[world.rank]
            _assert_close(weight.grad, mine)


def test_two_ranks() -> None:
    run_ranks(2, _two_ranks)
