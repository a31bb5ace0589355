"""Mamba-2 in plain torch: SGLang takes its convolution, scan and state update from Triton or CUDA.

The four functions have the signatures of SGLang's kernels, as far as Nemotron-H uses them: no
speculative decoding, no states tracked inside a prompt. The scan is in fp32, all prompts of a batch
at once.

Shapes: T tokens of U requests laid end to end, L the longest of them, R requests in decoding,
C convolved channels, w the width of the convolution, H heads of P channels, G groups of heads that
share B and C, N the state size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from miles_lite.rollout.embedded import mamba


def conv_prefill(
    x_C_T: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor | None,
    activation: str | None,
    **_: Any,
) -> Tensor:
    """Causal depthwise convolution over each request; its last w-1 inputs go to `conv_states`
    [slots, C, w-1]. A negative slot is padding."""
    before = weight.shape[1] - 1
    lens = query_start_loc.diff()
    x_U_L_C = pad_sequence(list(x_C_T.T.split(lens.tolist())), batch_first=True)
    x = x_U_L_C.transpose(1, 2)
    slots = cache_indices.long()
    state = x.new_zeros(len(lens), x.shape[1], before)
    if has_initial_state is not None:
        used = has_initial_state & (slots >= 0)
        state[used] = conv_states[slots[used], :, :before].to(x.dtype)
    full = torch.cat([state, x], 2)
    out = F.conv1d(full, weight[:, None].to(x.dtype), bias, groups=x.shape[1])
    out = F.silu(out) if activation else out
    # input t lies at t + w-1 of `full`, so the last w-1 true inputs begin at the true length
    last = (lens[:, None] + torch.arange(before))[:, None].expand(-1, x.shape[1], -1)
    kept = slots >= 0
    conv_states[slots[kept], :, :before] = full.gather(2, last)[kept].to(conv_states.dtype)
    return out.transpose(1, 2)[_is_token(lens)].T


def conv_decode(
    x_R_C: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: Tensor,
    **_: Any,
) -> Tensor:
    """The same for one token each; advances `conv_state`."""
    before = weight.shape[1] - 1
    slots = conv_state_indices.long()
    kept = slots >= 0
    state = conv_state[slots.clamp_min(0), :, :before].to(x_R_C.dtype)
    full = torch.cat([state, x_R_C[:, :, None]], 2)
    out = (full * weight.to(x_R_C.dtype)).sum(-1)
    out = out if bias is None else out + bias
    conv_state[slots[kept], :, :before] = full[kept, :, 1:].to(conv_state.dtype)
    return F.silu(out) if activation else out


def scan_prefill(
    x: Tensor,
    dt: Tensor,
    A_H: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    initial_states: Tensor | None,
    out: Tensor,
    state_dtype: torch.dtype,
    **_: Any,
) -> tuple[None, Tensor, None]:
    """x and out [1, T, H, P], dt [1, T, H], B and C [1, T, G, N]. Writes `out`; returns the states
    after each request, [U, H, P, N], between two results that only speculation and prefix caching
    ask for."""
    lens = cu_seqlens.diff()
    dt = F.softplus(dt.float() + dt_bias.float())

    def padded(t: Tensor) -> Tensor:
        return pad_sequence(list(t[0].float().split(lens.tolist())), batch_first=True)

    initial = None if initial_states is None else initial_states.float()
    # padding has a dt of 0, which leaves the state alone
    y, state = mamba.scan_prefill(
        padded(x), padded(dt), A_H.float(), (padded(B), padded(C)), initial
    )
    out.copy_(y[_is_token(lens)][None] + x.float() * D.float()[:, None])
    return None, state.to(state_dtype), None


def scan_decode(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    state_batch_indices: Tensor,
    out: Tensor,
    **_: Any,
) -> None:
    """One step of `state` [slots, H, P, N] for x and out [R, H, P], B and C [R, G, N]. dt, A, D
    and dt_bias come expanded over P and N."""
    slots = state_batch_indices.long()
    kept = slots >= 0
    dt_R_H = F.softplus(dt[:, :, 0].float() + dt_bias[:, 0].float())
    before = state[slots.clamp_min(0)].float()
    B, C = (t.float().repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    decay = (dt_R_H * A[:, 0, 0].float()).exp()[..., None, None]
    after = before.mul_(decay).addcmul_((dt_R_H[..., None] * x.float())[..., None], B[:, :, None])
    state[slots[kept]] = after[kept].to(state.dtype)
    y = (after @ C[..., None])[..., 0]
    out.copy_(y + x.float() * D[:, :1].float())


def _is_token(lens: Tensor) -> Tensor:
    """[U, L], False at padding."""
    return torch.arange(int(lens.max())) < lens[:, None]


def _patch_mixer(module: Any) -> None:
    module.causal_conv1d_fn = module.causal_conv1d_fn_triton = conv_prefill
    module.causal_conv1d_update = module.causal_conv1d_update_triton = conv_decode
    module.mamba_chunk_scan_combined = scan_prefill
    module.selective_state_update = scan_decode


PATCHES = {"sglang.srt.layers.attention.mamba.mamba": _patch_mixer}
