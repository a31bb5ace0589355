"""The forward pass of one rank: its shard of a nemotron_h model, prompts and single tokens alike.

Shapes: T tokens of this data-parallel group in one step, end to end without padding; S sequences
whose next token is wanted; U different prompts padded to L; R running sequences; H hidden; w the
width in which experts live. Everything is per token but `M` and `*`, which see sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.rollout.embedded import mamba
from miles_lite.rollout.embedded.cache import Cache
from miles_lite.rollout.embedded.comm import Comm, Comms
from miles_lite.rollout.embedded.experts import mix_experts, relu2, route
from miles_lite.rollout.embedded.scheduler import Plan
from miles_lite.rollout.layout import params


@dataclass(frozen=True, slots=True)
class Step:
    """A plan as tensors. Prompts are read into slots first .. first + S, or, with no prompt, slots
    0 .. R-1 each advance by a token."""

    tokens: Tensor  # [T]
    slots: slice
    lens: Tensor  # [U] of the prompts, or [R] tokens already in the cache
    max_len: int  # L, or most tokens in the cache after this step
    pad: Tensor | None  # [U, L] index into T; padding points at token 0; None when decoding
    unpad: Tensor  # [T] index into U * L
    source: Tensor  # [S] which prompt a slot starts from
    last: Tensor  # index into T of each token whose successor is wanted: one of each slot, or
    # as many as are to be scored

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Step:
        slots = slice(plan.first_slot, plan.first_slot + len(plan.sequences))
        none = torch.empty(0, dtype=torch.long, device=device)
        if not plan.prompts:
            tokens = torch.tensor([s.tokens[-1] for s in plan.sequences], device=device)
            cached = [s.position - 1 for s in plan.sequences]
            lens = torch.tensor(cached, device=device)
            return cls(tokens, slots, lens, max(cached) + 1, None, none, none, none)
        tokens = torch.tensor([t for prompt in plan.prompts for t in prompt], device=device)
        lens = torch.tensor([len(prompt) for prompt in plan.prompts], device=device)
        max_len = max(map(len, plan.prompts))
        place = torch.arange(max_len, device=device)
        valid = place < lens[:, None]
        ends = lens.cumsum(0)
        pad = torch.where(valid, (ends - lens)[:, None] + place, 0)
        source = torch.tensor(plan.source, device=device)
        wanted = [s.num_wanted for s in plan.sequences]
        spans = zip(ends[source].tolist(), wanted, strict=True)
        last = torch.cat([torch.arange(end - n, end) for end, n in spans]).to(device)
        return cls(tokens, slots, lens, max_len, pad, valid.view(-1).nonzero()[:, 0], source, last)


class Model:
    """Weights of one rank by name (`layout.params`), and what to do with them."""

    comms: Comms  # set once the ranks are connected
    # called with a layer's number and what it hands on [T, H], and last with the logits
    watch: Callable[[int, Tensor], None] | None = None

    def __init__(self, model: NemotronH, dims: EngineDims, rank: int, dtype: torch.dtype):
        self.config, self.dims, self.rank, self.dtype = model, dims, rank, dtype
        self.params = params(model, dims, rank)
        self.weights: dict[str, Tensor] = {}
        self.mixers = {"M": self._mamba, "*": self._attention, "-": self._dense}

    def allocate(self, device: torch.device) -> None:
        """Room for all weights; NaN until they arrive, so that none can be forgotten unseen."""
        for param in self.params:
            dtype = torch.float32 if param.keep_fp32 else self.dtype
            self.weights[param.name] = torch.full(
                param.shape, torch.nan, dtype=dtype, device=device
            )

    def drop(self) -> None:
        self.weights.clear()

    def forward(
        self,
        step: Step | None,
        counts: Sequence[int],
        cache: Cache,
        chosen: list[Tensor] | None = None,
    ) -> Tensor | None:
        """fp32 logits [N, V] of this group's step; None when only other groups have tokens.

        counts: tokens of every data-parallel group; all ranks call this together.
        chosen: takes the experts [T, K] of this group's tokens, layer by layer.
        """
        w, config = self.weights, self.config
        if step is None:
            x = w["norm_f"].new_empty(0, config.hidden_size)
        else:
            x = self._embed(step.tokens)
        for layer, kind in enumerate(config.pattern):
            u = rms_norm(x, w[f"layers.{layer}.norm"], config.norm_eps)
            if kind == "E":
                x = x + self._moe(layer, u, counts, chosen)
            elif step is not None:
                x = x + self.mixers[kind](layer, u, step, cache)
            if self.watch:
                self.watch(layer, x)
        if step is None:
            return None
        if step.pad is not None:
            x = x[step.last]
        x = rms_norm(x, w["norm_f"], config.norm_eps)
        shards = self.comms.attn.gather(F.linear(x, w["lm_head"]))
        logits = shards.transpose(0, 1).reshape(len(x), -1).float()
        if self.watch:
            self.watch(config.num_layers, logits)
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        table, attn = self.weights["embeddings"], self.comms.attn
        if attn.size == 1:
            return table[tokens]
        row = tokens - attn.rank * len(table)
        mine = (row >= 0) & (row < len(table))
        return attn.sum(table[torch.where(mine, row, 0)] * mine[:, None])

    def _mamba(self, layer: int, u: Tensor, step: Step, cache: Cache) -> Tensor:
        config, parts, w = self.config, self.comms.attn.size, self._layer(layer)
        heads, groups = config.mamba_num_heads // parts, config.mamba_num_groups // parts
        inner, bc = config.mamba_inner_size // parts, config.mamba_bc_size // parts
        z, xbc, dt = F.linear(u, w("in_proj")).split([inner, inner + 2 * bc, heads], -1)
        dt = F.softplus(dt.float() + w("dt_bias"))
        A = -w("A_log").exp()
        conv, ssm = cache.conv[layer][step.slots], cache.ssm[layer][step.slots]
        if step.pad is None:
            xbc = mamba.conv_decode(xbc, conv, w("conv_weight"), w("conv_bias"))
        else:
            xbc, last = mamba.conv_prefill(
                xbc[step.pad], step.lens, w("conv_weight"), w("conv_bias")
            )
            conv.copy_(last[step.source])
        x, B, C = xbc.split([inner, bc, bc], -1)
        x, B, C = (
            x.unflatten(-1, (heads, -1)),
            B.unflatten(-1, (groups, -1)),
            C.unflatten(-1, (groups, -1)),
        )
        if step.pad is None:
            y = mamba.scan_decode(ssm, x, dt, A, (B, C))
        else:
            is_token = torch.arange(step.max_len, device=u.device) < step.lens[:, None]
            y, state = mamba.scan_prefill(x, dt[step.pad] * is_token[..., None], A, (B, C))
            ssm.copy_(
                state[step.source].unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)
            )
        y = (y + w("D")[:, None] * x.float()).flatten(-2)
        if step.pad is not None:
            y = y.flatten(0, 1)[step.unpad]
        y = mamba.gated_norm(y.to(u.dtype), z, w("gated_norm"), groups, config.norm_eps)
        return self.comms.attn.sum(F.linear(y, w("out_proj")))

    def _attention(self, layer: int, u: Tensor, step: Step, cache: Cache) -> Tensor:
        """Grouped-query attention without positions, softmax in fp32 or better by sdpa."""
        w, (keys, values) = self._layer(layer), cache.kv[layer]
        num_kv, width = keys.shape[1], keys.shape[3]
        q, k, v = (
            F.linear(u, w("qkv"))
            .unflatten(-1, (-1, width))
            .split([self.config.num_heads // self.comms.attn.size, num_kv, num_kv], -2)
        )
        if step.pad is None:
            rows = torch.arange(len(u), device=u.device)
            keys[rows, :, step.lens] = k
            values[rows, :, step.lens] = v
            seen = torch.arange(step.max_len, device=u.device) <= step.lens[:, None]
            # the query heads of a kv head stand where sdpa expects positions
            out = F.scaled_dot_product_attention(
                q.unflatten(1, (num_kv, -1)),
                keys[step.slots, :, : step.max_len],
                values[step.slots, :, : step.max_len],
                attn_mask=seen[:, None, None],
            ).flatten(1)
        else:
            q, k, v = (t[step.pad].transpose(1, 2) for t in (q, k, v))  # [U, heads, L, width]
            keys[step.slots, :, : step.max_len] = k[step.source]
            values[step.slots, :, : step.max_len] = v[step.source]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).flatten(2).flatten(0, 1)[step.unpad]
        return self.comms.attn.sum(F.linear(out, w("o_proj")))

    def _dense(self, layer: int, u: Tensor, step: Step, cache: Cache) -> Tensor:
        w = self._layer(layer)
        return self.comms.attn.sum(F.linear(relu2(F.linear(u, w("up"))), w("down")))

    def _moe(
        self, layer: int, u: Tensor, counts: Sequence[int], chosen: list[Tensor] | None
    ) -> Tensor:
        """Routed experts in latent width for the tokens of all groups, shared expert for our own.

        One gather before the experts (only with several groups) and one sum after them, which also
        completes the shared expert: on small tensors the number of collectives is the cost.
        """
        w, config, comms = self._layer(layer), self.config, self.comms
        choices, weights = route(u, w("gate"), w("correction_bias"), config)
        if chosen is not None:
            chosen.append(choices)
        v = F.linear(u, w("latent_in")) if config.latent_size else u
        shared = F.linear(relu2(F.linear(u, w("shared_up"))), w("shared_down"))
        own = slice(0, len(u))
        if comms.peers.size > 1:
            v, choices, weights = _gather_tokens(comms.peers, max(counts), v, choices, weights)
            start = comms.peers.rank * max(counts)
            own = slice(start, start + len(u))
        first = self.dims.ep_rank(self.rank) * len(w("experts_up"))
        routed = mix_experts(v, choices, weights, w("experts_up"), w("experts_down"), first)
        if comms.attn.size > 1:  # the shared expert is a partial sum too
            both = routed.new_zeros(len(routed), routed.shape[1] + shared.shape[1])
            both[:, : routed.shape[1]] = routed
            both[own, routed.shape[1] :] = shared
            both = comms.everyone.sum(both)[own]
            routed, shared = both[:, : routed.shape[1]], both[:, routed.shape[1] :].to(u.dtype)
        else:
            routed = comms.everyone.sum(routed)[own]
        routed = routed.to(u.dtype)
        if config.latent_size:
            routed = F.linear(routed, w("latent_out"))
        return routed + shared

    def _layer(self, layer: int) -> Callable[[str], Tensor]:
        weights, prefix = self.weights, f"layers.{layer}."
        return lambda name: weights[prefix + name]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 throughout, rounded once at the end."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def _gather_tokens(
    peers: Comm, num_tokens: int, v: Tensor, choices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of all groups, each padded to `num_tokens`, in one collective over raw bytes.

    Padding chooses expert -1, which no rank hosts.
    """
    mine = [v.contiguous(), choices.int(), weights]
    packed = torch.cat([part.view(torch.uint8) for part in mine], 1)
    # 0xff everywhere reads as -1 for the choices; v and weights must stay finite
    box = packed.new_zeros(num_tokens, packed.shape[1])
    sizes = [part.shape[1] * part.element_size() for part in mine]
    box[:, sizes[0] : sizes[0] + sizes[1]] = 0xFF
    box[: len(packed)] = packed
    parts = peers.gather(box).flatten(0, 1).split(sizes, 1)
    v, choices, weights = (
        part.contiguous().view(like.dtype) for part, like in zip(parts, mine, strict=True)
    )
    return v, choices.long(), weights
