"""The weight table: how HF tensors of a model make up Megatron's parameters. Written once.

A row is one Megatron parameter or buffer: parts laid end to end, each part a run of segments of HF
tensors, each part cut evenly by tensor parallelism. That one form covers a plain copy (one part,
one segment), Mamba's in_proj (five parts, so that every rank holds its share of each of z, x, B,
C, dt) and the fused QKV (one part, whose segments go head group by head group). Weight sync,
loader and export all read rows; nobody else knows a layout.

Names are those of megatron-core's local (non-TE) layer specs and of HF checkpoints on disk.
Sources: `nemotron_h` checkpoints, megatron-core `sharded_state_dict` of its Mamba model.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.protocols import Hosted, Segment


class Cut(Enum):
    """Which group of ranks a row is spread over."""

    none = "none"  # every rank of the stage holds all of it
    tensor = "tensor"  # tensor-parallel ranks
    expert = "expert"  # one expert: one EP rank, its expert-tensor-parallel ranks


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of the HF checkpoint."""

    name: str
    shape: tuple[int, ...]
    dim: int  # along which it may be cut
    fp32: bool = False  # kept in fp32 on both sides, whatever the model's dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Parts = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter or buffer."""

    megatron: str  # global layer and expert numbers
    hf: tuple[HfTensor, ...]
    dim: int  # along which segments lie
    parts: Parts
    cut: Cut
    layer: int  # -1 for the embedding, num_layers for what follows the last layer
    expert: int = -1  # expert number, -1 if it is none

    def segments(self, rank: int, size: int) -> tuple[Segment, ...]:
        """What rank `rank` of `size` holds, in its local order."""
        return tuple(s for part in self.parts for s in _slice(part, rank, size))


def _slice(part: Sequence[Segment], rank: int, size: int) -> Iterator[Segment]:
    """The rank-th of `size` equal pieces of segments laid end to end."""
    total = sum(map(len, part))
    assert total % size == 0, f"{part[0].tensor}: {total} rows do not divide by {size}"
    begin, end = rank * total // size, (rank + 1) * total // size
    offset = 0
    for segment in part:
        lo, hi = max(begin - offset, 0), min(end - offset, len(segment))
        if lo < hi:
            yield Segment(segment.tensor, segment.start + lo, segment.start + hi)
        offset += len(segment)


def rows(model: NemotronH) -> Iterator[Row]:
    """Every row of the main stack (multi-token prediction is not part of it: see mtp_tensors)."""
    vocab = (model.vocab_size, model.hidden_size)
    yield _copy(
        "embedding.word_embeddings.weight", "backbone.embeddings.weight", vocab, Cut.tensor, -1
    )
    for layer in range(model.num_layers):
        yield from _layer_rows(
            model,
            model.pattern[layer],
            f"backbone.layers.{layer}.",
            f"decoder.layers.{layer}.",
            layer,
        )
    last = model.num_layers
    yield _copy(
        "decoder.final_norm.weight", "backbone.norm_f.weight", (model.hidden_size,), Cut.none, last
    )
    yield _copy("output_layer.weight", "lm_head.weight", vocab, Cut.tensor, last)


def hf_tensors(model: NemotronH) -> dict[str, HfTensor]:
    """Every HF tensor of the main stack by name."""
    return {tensor.name: tensor for row in rows(model) for tensor in row.hf}


def mtp_tensors(model: NemotronH) -> dict[str, HfTensor]:
    """HF tensors of the multi-token-prediction block: carried through untrained.

    A block's inner layers are numbered on; the projections that open it sit on the first, the norm
    that closes it on the last.
    """
    found: dict[str, HfTensor] = {}
    hidden = model.hidden_size
    for index, kind in enumerate(model.mtp_pattern):
        prefix = f"mtp.layers.{index}."
        for row in _layer_rows(model, kind, prefix, prefix, index):
            found |= {tensor.name: tensor for tensor in row.hf}
    if model.mtp_pattern:
        first, last = "mtp.layers.0.", f"mtp.layers.{len(model.mtp_pattern) - 1}."
        for name, shape in (
            (first + "enorm.weight", (hidden,)),
            (first + "hnorm.weight", (hidden,)),
            (first + "eh_proj.weight", (hidden, 2 * hidden)),
            (last + "final_layernorm.weight", (hidden,)),
        ):
            found[name] = HfTensor(name, shape, 0)
    return found


@functools.lru_cache(maxsize=4)
def _rows_of_stages(model: NemotronH, pp: int, ep: int) -> Mapping[tuple[int, int], Sequence[Row]]:
    """By pipeline stage and EP rank, -1 for what is no expert: a layout of many ranks goes through
    every row once, and not once a rank."""
    layers_per_stage, experts_per_rank = model.num_layers // pp, max(1, model.num_experts // ep)
    found: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows(model):
        stage = min(max(row.layer, 0), model.num_layers - 1) // layers_per_stage
        holder = row.expert // experts_per_rank if row.cut is Cut.expert else -1
        found[stage, holder].append(row)
    return found


def trainer_layout(model: NemotronH, dims: ParallelDims, rank: int) -> list[Hosted]:
    """What one trainer rank holds, under the names its own module uses (local numbering)."""
    layers_per_stage = model.num_layers // dims.pp
    experts_per_rank = model.num_experts // dims.ep
    stage = dims.pp_rank(rank)
    by_place = _rows_of_stages(model, dims.pp, dims.ep)
    hosted = []
    for row in (*by_place[stage, -1], *by_place.get((stage, dims.ep_rank(rank)), ())):
        name, index, size = row.megatron, 0, 1
        if row.cut is Cut.tensor:
            index, size = dims.tp_rank(rank), dims.tp
        elif row.cut is Cut.expert:
            index, size = dims.expert_tp_rank(rank), dims.expert_tp
            local = row.expert % experts_per_rank
            name = name.replace(f".local_experts.{row.expert}.", f".local_experts.{local}.")
        local = row.layer - stage * layers_per_stage
        name = name.replace(f"decoder.layers.{row.layer}.", f"decoder.layers.{local}.", 1)
        hosted.append(Hosted(name, -1, row.dim, row.segments(index, size)))
    return hosted


def trainer_layouts(model: NemotronH, dims: ParallelDims) -> list[list[Hosted]]:
    """Of every rank; ranks that hold the same share one list."""
    known: dict[tuple[int, ...], list[Hosted]] = {}
    found = []
    for rank in range(dims.world_size):
        key = (
            dims.pp_rank(rank),
            dims.tp_rank(rank),
            dims.ep_rank(rank),
            dims.expert_tp_rank(rank),
        )
        if key not in known:
            known[key] = trainer_layout(model, dims, rank)
        found.append(known[key])
    return found


def iter_segments(hosted: Hosted) -> Iterator[tuple[str, int, int, int]]:
    """(tensor, HF start, offset in the hosted tensor, rows) of each segment."""
    offset = 0
    for segment in hosted.segments:
        yield segment.tensor, segment.start, offset, len(segment)
        offset += len(segment)


# ------------------------------------------------------------------ rows of one layer


def _copy(
    megatron: str,
    hf: str,
    shape: tuple[int, ...],
    cut: Cut,
    layer: int,
    *,
    dim: int = 0,
    expert: int = -1,
    fp32: bool = False,
) -> Row:
    tensor = HfTensor(hf, shape, dim, fp32)
    whole = Segment(hf, 0, shape[dim])
    return Row(megatron, (tensor,), dim, ((whole,),), cut, layer, expert)


def _split(megatron: str, hf: str, shape: tuple[int, ...], sizes: Sequence[int], layer: int) -> Row:
    """One HF tensor whose row blocks are each spread over all tensor-parallel ranks."""
    assert sum(sizes) == shape[0], f"{hf}: blocks {sizes} do not make up {shape[0]} rows"
    parts, start = [], 0
    for size in sizes:
        parts.append((Segment(hf, start, start + size),))
        start += size
    return Row(megatron, (HfTensor(hf, shape, 0),), 0, tuple(parts), Cut.tensor, layer)


def _layer_rows(model: NemotronH, kind: str, hf: str, megatron: str, layer: int) -> Iterator[Row]:
    build = {"M": _mamba_rows, "*": _attention_rows, "E": _moe_rows, "-": _mlp_rows}[kind]
    return build(model, hf, megatron, layer)


def _mamba_rows(model: NemotronH, hf: str, mg: str, layer: int) -> Iterator[Row]:
    hidden, inner, bc = model.hidden_size, model.mamba_inner_size, model.mamba_bc_size
    heads, conv = model.mamba_num_heads, inner + 2 * bc
    yield _copy(mg + "norm.weight", hf + "norm.weight", (hidden,), Cut.none, layer)
    hf, mg = hf + "mixer.", mg + "mixer."
    in_blocks = (inner, inner, bc, bc, heads)  # z, x, B, C, dt
    yield _split(
        mg + "in_proj.weight", hf + "in_proj.weight", (sum(in_blocks), hidden), in_blocks, layer
    )
    for name, shape in (
        ("conv1d.weight", (conv, 1, model.conv_kernel)),
        ("conv1d.bias", (conv,)),
    ):
        yield _split(mg + name, hf + name, shape, (inner, bc, bc), layer)
    for name in ("A_log", "D", "dt_bias"):
        yield _copy(mg + name, hf + name, (heads,), Cut.tensor, layer, fp32=True)
    yield _copy(mg + "norm.weight", hf + "norm.weight", (inner,), Cut.tensor, layer)
    yield _copy(
        mg + "out_proj.weight", hf + "out_proj.weight", (hidden, inner), Cut.tensor, layer, dim=1
    )


def _attention_rows(model: NemotronH, hf: str, mg: str, layer: int) -> Iterator[Row]:
    hidden, head_dim = model.hidden_size, model.head_dim
    q_size, kv_size = model.num_heads * head_dim, model.num_kv_heads * head_dim
    yield _copy(mg + "input_layernorm.weight", hf + "norm.weight", (hidden,), Cut.none, layer)
    tensors = tuple(
        HfTensor(hf + f"mixer.{x}_proj.weight", (size, hidden), 0)
        for x, size in zip("qkv", (q_size, kv_size, kv_size), strict=True)
    )
    # per KV head: its query heads, its key head, its value head. Megatron cuts these rows evenly,
    # through a head group if there are more ranks than KV heads.
    groups = model.num_kv_heads
    qkv = tuple(
        Segment(t.name, g * t.shape[0] // groups, (g + 1) * t.shape[0] // groups)
        for g in range(groups)
        for t in tensors
    )
    yield Row(mg + "self_attention.linear_qkv.weight", tensors, 0, (qkv,), Cut.tensor, layer)
    yield _copy(
        mg + "self_attention.linear_proj.weight",
        hf + "mixer.o_proj.weight",
        (hidden, q_size),
        Cut.tensor,
        layer,
        dim=1,
    )


def _mlp_rows(model: NemotronH, hf: str, mg: str, layer: int) -> Iterator[Row]:
    yield _copy(
        mg + "pre_mlp_layernorm.weight", hf + "norm.weight", (model.hidden_size,), Cut.none, layer
    )
    yield from _two_linears(
        model.hidden_size, model.dense_ffn_size, hf + "mixer.", mg + "mlp.", Cut.tensor, layer
    )


def _moe_rows(model: NemotronH, hf: str, mg: str, layer: int) -> Iterator[Row]:
    hidden, experts, width = model.hidden_size, model.num_experts, model.expert_width
    yield _copy(mg + "pre_mlp_layernorm.weight", hf + "norm.weight", (hidden,), Cut.none, layer)
    hf, mg = hf + "mixer.", mg + "mlp."
    yield _copy(mg + "router.weight", hf + "gate.weight", (experts, hidden), Cut.none, layer)
    yield _copy(
        mg + "router.expert_bias",
        hf + "gate.e_score_correction_bias",
        (experts,),
        Cut.none,
        layer,
        fp32=True,
    )
    if model.latent_size:
        for name, shape in (
            ("fc1_latent_proj.weight", (width, hidden)),
            ("fc2_latent_proj.weight", (hidden, width)),
        ):
            yield _copy(mg + name, hf + name, shape, Cut.none, layer)
    for expert in range(experts):
        yield from _two_linears(
            width,
            model.expert_ffn_size,
            f"{hf}experts.{expert}.",
            f"{mg}experts.local_experts.{expert}.",
            Cut.expert,
            layer,
            expert,
        )
    yield from _two_linears(
        hidden,
        model.shared_ffn_size,
        hf + "shared_experts.",
        mg + "shared_experts.",
        Cut.tensor,
        layer,
    )


def _two_linears(
    width: int, ffn: int, hf: str, mg: str, cut: Cut, layer: int, expert: int = -1
) -> Iterator[Row]:
    """Ungated MLP: up [ffn, width] cut by rows, down [width, ffn] cut by columns."""
    yield _copy(
        mg + "linear_fc1.weight", hf + "up_proj.weight", (ffn, width), cut, layer, expert=expert
    )
    yield _copy(
        mg + "linear_fc2.weight",
        hf + "down_proj.weight",
        (width, ffn),
        cut,
        layer,
        dim=1,
        expert=expert,
    )
