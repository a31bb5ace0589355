"""The Mamba-2 maths, for many sequences at once: prompts from an empty state, or one token each.

Shapes: U prompts of at most L tokens, R running sequences, C convolved channels, k the kernel,
h heads of p channels, g groups of h/g heads that share B and C, n state size. State maths is fp32;
the state itself is [g, n, c], with c the channels of all heads of a group innermost: a decode step
runs along them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a chunk of the scan: near the cheapest for states of 16x16 to 64x128. It need not be the
# model's chunk_size, on which results do not depend.
SCAN_CHUNK = 32


def conv_prefill(
    x_U_L_C: Tensor, lens_U: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution and SiLU. Also the last k-1 inputs of each prompt, [U, k-1, C].

    Prompts are padded on the right, so valid outputs never see padding.
    """
    kernel = weight.shape[-1]
    padded = F.pad(x_U_L_C, (0, 0, kernel - 1, 0))
    out = bias.float()
    for tap in range(kernel):
        out = out + padded[:, tap : tap + x_U_L_C.shape[1]].float() * weight[:, 0, tap].float()
    # input t lies at t + k-1 of `padded`, so the last k-1 true inputs begin at the true length
    last = lens_U[:, None] + torch.arange(kernel - 1, device=lens_U.device)
    state = padded[torch.arange(len(lens_U), device=lens_U.device)[:, None], last]
    return F.silu(out).to(x_U_L_C.dtype), state


def conv_decode(x_R_C: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same for one token each; advances `state` [R, k-1, C] in place."""
    window = torch.cat([state, x_R_C[:, None]], 1)
    out = (window.float() * weight[:, 0].T.float()).sum(1) + bias.float()
    state.copy_(window[:, 1:])
    return F.silu(out).to(x_R_C.dtype)


def scan_prefill(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    BC: tuple[Tensor, Tensor],
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state-space recurrence over prompts, chunk by chunk, from `initial` or an empty state.

    x [U, L, h, p], dt [U, L, h] (0 at padding, which then leaves the state alone), A [h],
    B and C [U, L, g, n]. Returns y [U, L, h, p] without the D term, and the state [U, h, p, n], as
    which `initial` comes too.
    Within a chunk it is the quadratic form of the recurrence, between chunks the recurrence.
    """
    U, L, h, p = x.shape
    g, n = BC[0].shape[2:]
    r = h // g
    x = (x.float() * dt[..., None]).view(U, L, g, r, p)
    B, C = BC[0].float(), BC[1].float()
    log_decay = (dt * A).view(U, L, g, r)
    state = x.new_zeros(U, g, r, p, n) if initial is None else initial.view(U, g, r, p, n)
    outputs = []
    for start in range(0, L, SCAN_CHUNK):
        x_c, B_c, C_c = (t[:, start : start + SCAN_CHUNK] for t in (x, B, C))
        total = log_decay[:, start : start + SCAN_CHUNK].cumsum(1)  # [U, q, g, r], inclusive
        since = total.permute(0, 2, 3, 1)
        since = since[..., :, None] - since[..., None, :]  # [U, g, r, q, k]: from k to q
        future = torch.ones(since.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        decay = since.masked_fill(future, float("-inf")).exp()
        scores = torch.einsum("uqgn,ukgn->ugqk", C_c, B_c)
        within = torch.einsum("ugrqk,ukgrp->uqgrp", decay * scores[:, :, None], x_c)
        before = torch.einsum("uqgn,ugrpn->uqgrp", C_c, state) * total.exp()[..., None]
        outputs.append(within + before)
        to_end = (total[:, -1:] - total).exp()[..., None]
        state = state * total[:, -1].exp()[..., None, None] + torch.einsum(
            "ukgrp,ukgn->ugrpn", x_c * to_end, B_c
        )
    return torch.cat(outputs, 1).view(U, L, h, p), state.flatten(1, 2)


def scan_decode(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, BC: tuple[Tensor, Tensor]
) -> Tensor:
    """One step of the recurrence; advances `state` [R, g, n, c] in place.

    x [R, h, p], dt [R, h], B and C [R, g, n]; returns y [R, h, p] without the D term.
    """
    rows = (state.shape[0], state.shape[1], 1, state.shape[3])
    decay = (dt * A).exp()[..., None].expand_as(x).reshape(rows)
    added = (x.float() * dt[..., None]).view(rows)
    state.mul_(decay).addcmul_(added, BC[0].float()[..., None])
    return torch.matmul(BC[1].float()[:, :, None], state).view(x.shape)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm over each of `groups` groups of channels of y * silu(z): the gate comes first."""
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * gated.flatten(-2)).to(z.dtype)
