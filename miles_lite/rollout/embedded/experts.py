"""Routing and the routed experts of one rank. T tokens, K choices each, E experts of width w."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from miles_lite.models.nemotron_h import NemotronH

# Padding every expert to the fullest is one batched product and wins while the waste is small;
# beyond this many times the real work (long prompts, a few hot experts) a loop over experts does.
MAX_PADDING = 4


def relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def route(u_T_H: Tensor, gate: Tensor, bias: Tensor, model: NemotronH) -> tuple[Tensor, Tensor]:
    """Choices [T, K] and their fp32 weights [T, K]. The correction bias only counts in choosing."""
    scores = torch.sigmoid(u_T_H.float() @ gate.float().T)
    choices = (scores + bias).topk(model.top_k, dim=-1).indices
    weights = scores.gather(1, choices)
    if model.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return choices, weights * model.routed_scaling_factor


def mix_experts(
    v_T_w: Tensor, choices: Tensor, weights: Tensor, up: Tensor, down: Tensor, first: int
) -> Tensor:
    """The weighted sum of this rank's experts, fp32 [T, w]; choices of other ranks add nothing.

    up [E, I, w], down [E, w, I]: experts first .. first + E of the model. The terms of a token
    are laid out by choice and then summed, not scattered, so that the order of the sum is fixed.
    """
    num_experts, num_choices = up.shape[0], choices.shape[1]
    local = choices.reshape(-1) - first
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    order = local.argsort(stable=True)  # choices of expert 0, of expert 1, ..., of other ranks
    sizes: list[int] = torch.bincount(local, minlength=num_experts + 1).tolist()[:num_experts]
    total = sum(sizes)
    terms = v_T_w.new_zeros(len(local), v_T_w.shape[1], dtype=torch.float32)
    if total:
        order = order[:total]
        x = v_T_w[order // num_choices]
        run = _padded if max(sizes) * num_experts <= MAX_PADDING * total else _looped
        terms[order] = run(x, local[order], sizes, up, down).float()
    return torch.bmm(weights[:, None], terms.view(*choices.shape, v_T_w.shape[1]))[:, 0]


def _padded(x: Tensor, expert: Tensor, sizes: list[int], up: Tensor, down: Tensor) -> Tensor:
    starts = torch.tensor(list(accumulate(sizes, initial=0)), device=x.device)
    place = torch.arange(len(x), device=x.device) - starts[expert]
    box = x.new_zeros(len(sizes), max(sizes), x.shape[1])
    box[expert, place] = x
    out = torch.bmm(relu2(torch.bmm(box, up.transpose(1, 2))), down.transpose(1, 2))
    return out[expert, place]


def _looped(x: Tensor, expert: Tensor, sizes: list[int], up: Tensor, down: Tensor) -> Tensor:
    pieces = x.split(sizes)
    return torch.cat(
        [relu2(piece @ up[e].T) @ down[e].T for e, piece in enumerate(pieces) if sizes[e]]
    )
