"""Routing and the routed experts of one rank. T tokens, K choices each, E experts of width w."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_lite.models.nemotron_h import NemotronH


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
    ends = torch.bincount(local, minlength=num_experts + 1)[:num_experts].cumsum(0).int()
    # choices of expert 0, of expert 1, ...; those of other ranks are left out
    order = local.argsort(stable=True)[: int(ends[-1])]
    terms = v_T_w.new_zeros(len(local), v_T_w.shape[1], dtype=torch.float32)
    if len(order):
        hidden = relu2(_by_expert(v_T_w[order // num_choices], up, ends))
        terms[order] = _by_expert(hidden, down, ends).float()
    return torch.bmm(weights[:, None], terms.view(*choices.shape, v_T_w.shape[1]))[:, 0]


def _by_expert(x_N_a: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows of x up to ends[e], and from the expert's before, times matrices[e] [b, a]: [N, b]."""
    if all(size * x_N_a.element_size() % 16 == 0 for size in matrices.shape[1:]):
        return F.grouped_mm(x_N_a, matrices.transpose(1, 2), offs=ends)
    pieces = x_N_a.tensor_split(ends[:-1].long().cpu())
    return torch.cat([piece @ each.T for piece, each in zip(pieces, matrices, strict=True)])
