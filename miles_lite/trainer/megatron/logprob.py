"""Last linear layer -> log-probability of the target and entropy, without [T, V] logits.

Logits exist in fp32 for one chunk of tokens at a time, in the forward and again in the backward
pass. The vocabulary may be cut over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under softmax(hidden @ weight.T / temperature).

    hidden [T, H] and targets [T] are equal on all ranks of `group`, weight is this rank's [V/tp, H]
    rows. Returns fp32 [T] and [T], equal on all ranks. The gradient of `hidden` is this rank's
    part: the caller sums it over the group.
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature, chunk, group)  # pyright: ignore


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        rank = 0 if group is None else dist.get_rank(group)
        local = targets - rank * weight.shape[0]  # row of the target, if this rank holds it
        peak, total, weighted, chosen = hidden.new_empty((4, hidden.shape[0]), dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], weight, temperature)
            chosen[rows] = _pick(logits, local[rows])
            peak[rows] = logits.amax(-1)
            logits.sub_(peak[rows, None])  # entropy is a difference: keep its terms small
            exp = logits.exp()
            total[rows] = exp.sum(-1)
            weighted[rows] = exp.mul_(logits).sum(-1)
        if group is not None and dist.get_world_size(group) > 1:
            drop = peak.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            drop -= peak
            scale = drop.exp()
            sums = torch.stack((total * scale, (weighted + total * drop) * scale, chosen))
            dist.all_reduce(sums, group=group)
            total, weighted, chosen = sums
        log_total = total.log()  # [T] logsumexp of the logits, less `peak`
        mean = weighted / total  # [T] expected logit, less `peak`
        ctx.save_for_backward(hidden, weight, local, peak, log_total, mean)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return chosen - peak - log_total, log_total - mean

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """d logprob / d logit_j = 1[j = target] - p_j; d entropy / d logit_j = -p_j (l_j - E l)."""
        hidden, weight, local, peak, log_total, mean = ctx.saved_tensors
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None  # only looked at: stacked with the log-probs, it comes as zeros
        grad_hidden = torch.zeros_like(hidden)
        # summed over chunks, hence in fp32 whatever the weight is
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            logits = _logits(hidden[rows], weight, ctx.temperature).sub_(peak[rows, None])
            p = (logits - log_total[rows, None]).exp()
            grad = torch.zeros_like(p)
            if grad_logprob is not None:
                grad.addcmul_(p, grad_logprob[rows, None], value=-1)
                index, here = _index(local[rows], weight.shape[0])
                grad.scatter_add_(1, index, (grad_logprob[rows] * here)[:, None])
            if grad_entropy is not None:
                centred = logits.sub_(mean[rows, None]).mul_(p)
                grad.addcmul_(centred, grad_entropy[rows, None], value=-1)
            grad = (grad / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden @ weight.T).float().div_(temperature)


def _index(local: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """A valid column [N, 1] for each target, and whether the target really is there [N]."""
    return local.clamp(0, num_rows - 1)[:, None], (local >= 0) & (local < num_rows)


def _pick(logits: Tensor, local: Tensor) -> Tensor:
    """The target's logit [N], zero where another rank holds it."""
    index, here = _index(local, logits.shape[1])
    return logits.gather(1, index).squeeze(1) * here
