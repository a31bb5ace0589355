"""Plain-torch stand-ins for what megatron-core takes from Transformer Engine and mamba_ssm.

Each has the constructor or signature of what it replaces, as far as megatron calls it.
Layout letters: T tokens, N sequences, L longest of them, H heads, P head size, G groups, S state
size, C chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """apex and Transformer Engine's Adam: the step count lives in the parameter group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                # torch's fused step walks through all of them as they lie in memory
                assert p.grad is not None and p.stride() == p.grad.stride(), "grads lie as params"
                if not self.state[p]:
                    self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            update(
                params,
                [p.grad for p in params],  # pyright: ignore[reportArgumentType]
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=False,
                fused=True,
            )


class DuplicatedLinear(nn.Module):
    """TELinear(parallel_mode="duplicated"): every TP rank holds the whole weight."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias, "no latent projection has a bias"
        from megatron.core.tensor_parallel import random

        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            tracker: Any = random.get_cuda_rng_tracker()
            same_on_all_tp_ranks = (
                tracker.fork(random.get_data_parallel_rng_tracker_name())
                if tracker.is_initialized()
                else nullcontext()
            )
            with same_on_all_tp_ranks:
                init_method(self.weight)
        self.weight.allreduce = True  # pyright: ignore[reportAttributeAccessIssue]
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets)


# ---- packed sequences


@dataclass(frozen=True, slots=True)
class Padded:
    """Sequences of like length as one padded batch."""

    tokens: Tensor  # [N, L] index in the packed row; padding repeats the last token
    num_seqs: int


@dataclass(frozen=True, slots=True)
class Unpacking:
    """A packed row <-> a few padded batches, laid end to end once computed.

    All layers are causal and padding comes last, so it never reaches a real token and its gradient
    is zero.
    """

    batches: tuple[Padded, ...]
    places: Tensor  # [T] where each packed token went

    @classmethod
    def of(cls, lens: Sequence[int]) -> Unpacking:
        return _unpacking(tuple(lens))

    def apply(self, function: Callable[..., Tensor], *packed: Tensor) -> Tensor:
        """Call function([N, L, ...], ...) -> [N, L, D] on each batch of packed [T, ...]: [T, D]."""
        outputs = []
        for batch in self.batches:
            rows = batch.tokens.flatten()
            padded = (x.index_select(0, rows).unflatten(0, (batch.num_seqs, -1)) for x in packed)
            outputs.append(function(*padded).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.places)


@lru_cache(maxsize=16)
def _unpacking(lens: tuple[int, ...]) -> Unpacking:
    """One batch if padding at most doubles the work, else one for each power of two of length."""
    length = torch.tensor(lens)
    start = length.cumsum(0) - length
    if len(lens) * max(lens) <= 2 * sum(lens):
        members = [torch.arange(len(lens))]
    else:
        size_class = torch.tensor([n.bit_length() for n in lens])
        members = [torch.nonzero(size_class == c).flatten() for c in size_class.unique()]
    batches, places, offset = [], torch.empty(sum(lens), dtype=torch.long), 0
    for seqs in members:
        within = torch.arange(int(length[seqs].max()))[None]  # [1, L]
        real = within < length[seqs, None]  # [N, L]
        tokens = start[seqs, None] + torch.minimum(within, length[seqs, None] - 1)
        places[tokens[real]] = offset + torch.nonzero(real.flatten()).flatten()
        batches.append(Padded(tokens, len(seqs)))
        offset += tokens.numel()
    return Unpacking(tuple(batches), places)


# ---- Mamba-2

MIN_CHUNK = 64  # tokens of a chunk; with fewer there are more operations, each too small to pay


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Convolution, scan and gate of a Mamba-2 mixer, as MambaMixer._ssm_training calls it.

    zxbcdt [N, L, 2 H P + 2 G S + H], conv1d_weight [H P + 2 G S, width], dt_bias, A, D [H].
    seq_idx [1, T] numbers the sequences of one packed row; each starts from a zero state.
    Returns [N, L, H P].
    """
    assert activation == "silu" and headdim is not None and not norm_before_gate
    num_heads = dt_bias.shape[0]
    inner = num_heads * headdim

    def mix(zxbcdt: Tensor) -> Tensor:
        z, xbc, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - num_heads, num_heads], -1)
        conv: Any = _CausalConv.apply
        xbc = F.silu(conv(xbc.float(), conv1d_weight.float(), conv1d_bias.float()))
        shared = (xbc.shape[-1] - inner) // 2
        x, B, C = xbc.to(zxbcdt.dtype).split([inner, shared, shared], -1)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, (num_heads, headdim)),
            dt,
            A,
            B.unflatten(-1, (ngroups, -1)),
            C.unflatten(-1, (ngroups, -1)),
            max(chunk_size, MIN_CHUNK),
            D=D,
            dt_bias=dt_bias,
        )
        return (y.flatten(-2) * F.silu(z.float())).to(zxbcdt.dtype)

    if seq_idx is None:
        return mix(zxbcdt)
    assert zxbcdt.shape[0] == 1, "packed sequences come as one row"
    lens = torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
    return Unpacking.of(lens).apply(mix, zxbcdt[0])[None]


class _CausalConv(torch.autograd.Function):
    """Depthwise convolution of x [N, L, D] with weight [D, width]; zeros before the start.

    In place, which autograd cannot: a third of the time of the sum of shifted products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # pyright: ignore
        taps = weight.T.contiguous()
        ctx.save_for_backward(x, taps)
        out = torch.addcmul(bias, x, taps[-1])
        for lag, tap in enumerate(taps.flip(0)[1 : x.shape[1]], 1):
            out[:, lag:].addcmul_(x[:, :-lag], tap)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        x, taps = ctx.saved_tensors
        grad_x, grad_taps = grad * taps[-1], torch.zeros_like(taps)
        grad_taps[-1] = (x * grad).sum((0, 1))
        for lag, tap in enumerate(taps.flip(0)[1 : x.shape[1]], 1):
            grad_x[:, :-lag].addcmul_(grad[:, lag:], tap)
            grad_taps[-1 - lag] = (x[:, :-lag] * grad[:, lag:]).sum((0, 1))
        return grad_x, grad_taps.T, grad.sum((0, 1))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """State-space scan y_t = C_t S_t + D x_t, S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t; in fp32.

    x [N, L, H, P], dt [N, L, H] before softplus, A and D [H], B and C [N, L, G, S]; head h reads
    group h * G // H. Within a chunk the recurrence is a masked matrix product, between chunks it is
    a loop; their size changes cost, not results. Returns fp32 [N, L, H, P].
    """
    assert D is not None and dt_bias is not None
    length, num_heads = x.shape[1], x.shape[2]
    num_chunks = -(-length // chunk_size)
    chunk = -(-length // num_chunks)
    pad = num_chunks * chunk - length

    dt = F.softplus(dt.float() + dt_bias.float())
    x_in, x = x, x.float() * dt[..., None]
    x = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (num_chunks, chunk)).transpose(2, 3)  # NCHQP
    B, C = (
        F.pad(t.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (num_chunks, chunk)).transpose(2, 3)
        for t in (B, C)
    )  # N C G Q S
    decay = F.pad(dt * A.float(), (0, 0, 0, pad)).unflatten(1, (num_chunks, chunk))
    decay = decay.transpose(2, 3).cumsum(-1)  # N C H Q: log of what is left of the chunk's start

    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    left = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, float("-inf")).exp()
    per_group = (B.shape[2], num_heads // B.shape[2])
    scores = (C @ B.transpose(-1, -2))[:, :, :, None] * left.unflatten(2, per_group)
    y = scores.flatten(2, 3) @ x  # N C H Q P
    if num_chunks > 1:
        y = y + _carried(x, B, C, decay, per_group)
    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    return y + x_in.float() * D.float()[:, None]


def _carried(x: Tensor, B: Tensor, C: Tensor, decay: Tensor, per_group: tuple[int, int]) -> Tensor:
    """What states of earlier chunks add to the output: N C H Q P, as `x` (C groups apart)."""
    to_end = (decay[..., -1:] - decay).exp()[..., None] * x  # N C H Q P
    written = to_end.unflatten(2, per_group).transpose(-1, -2) @ B[:, :, :, None]  # N C G H/G P S
    whole = decay[..., -1].exp().unflatten(2, per_group)[..., None, None]
    state, before = torch.zeros_like(written[:, 0]), []
    for i in range(x.shape[1]):
        before.append(state)
        state = whole[:, i] * state + written[:, i]
    read = C[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)  # N C G H/G Q P
    return read.flatten(2, 3) * decay.exp()[..., None]


# ---- attention


class TorchAttention(nn.Module):
    """Core attention through torch's SDPA: causal, grouped queries, packed sequences too."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[L, N, heads, size] each, or [T, heads, size] when packed -> [L, N, D] or [T, 1, D]."""
        if packed_seq_params is None:
            return self._attend(*(t.transpose(0, 1) for t in (query, key, value))).transpose(0, 1)
        bounds = packed_seq_params.cu_seqlens_q
        assert packed_seq_params.cu_seqlens_q_padded is None and bounds[-1] == query.shape[0]
        unpacking = Unpacking.of(bounds.diff().tolist())
        return unpacking.apply(self._attend, query, key, value)[:, None]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, L, heads, size] -> [N, L, heads * size]."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(2)
