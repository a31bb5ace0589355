"""Which slice of which HF tensor a rank of an engine hosts: the one description of its weights.

Embedding, attention, Mamba, dense and shared MLPs are cut over the attention group; experts over
all ranks (sets of experts over EP, the intermediate width of each over expert-TP); norms, routers
and latent projections are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Hosted, Segment


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter or buffer of a rank. `hosted` covers it once, but for padding."""

    name: str  # "layers.3.in_proj"
    shape: tuple[int, ...]
    keep_fp32: bool  # whatever the dtype of the model
    hosted: tuple[Hosted, ...]

    @property
    def padded(self) -> bool:
        """Whether its last rows are nobody's."""
        covered = sum(len(segment) for h in self.hosted for segment in h.segments)
        if not covered:
            return True
        first = self.hosted[0]
        stacked = first.index >= 0
        return covered < self.shape[first.dim + stacked] * (self.shape[0] if stacked else 1)


def check_layout(model: NemotronH, dims: EngineDims) -> None:
    """Refuse layouts that would cut a head, a group or an expert in the wrong place."""
    if dims.tp % dims.dp or dims.tp % dims.ep:
        raise ValueError(f"engine tp = {dims.tp} is no multiple of dp = {dims.dp}, ep = {dims.ep}")
    cuts = {"vocab_size": model.vocab_size}
    if "M" in model.pattern:
        cuts["mamba n_groups"] = model.mamba_num_groups
        cuts["mamba_num_heads"] = model.mamba_num_heads
    if "*" in model.pattern:
        cuts["num_attention_heads"] = model.num_heads
    if "-" in model.pattern:
        cuts["intermediate_size"] = model.dense_ffn_size
    if "E" in model.pattern:
        cuts["moe_shared_expert_intermediate_size"] = model.shared_ffn_size
    for what, size in cuts.items():
        if size % dims.attn_tp:
            raise ValueError(
                f"{what} = {size} cannot be cut over the {dims.attn_tp} ranks of an attention "
                f"group (engine tp = {dims.tp}, dp = {dims.dp}); raise dp or lower tp"
            )
    if "*" in model.pattern and max(model.num_kv_heads, dims.attn_tp) % min(
        model.num_kv_heads, dims.attn_tp
    ):
        raise ValueError(
            f"num_key_value_heads = {model.num_kv_heads} and attention group size "
            f"{dims.attn_tp}: one must divide the other"
        )
    if "E" in model.pattern and (
        model.num_experts % dims.ep or model.expert_ffn_size % dims.expert_tp
    ):
        raise ValueError(
            f"n_routed_experts = {model.num_experts} over ep = {dims.ep} and "
            f"moe_intermediate_size = {model.expert_ffn_size} over {dims.expert_tp} ranks must "
            f"come out even (engine tp = {dims.tp}); change ep"
        )


def kv_heads(model: NemotronH, dims: EngineDims, rank: int) -> range:
    """The key/value heads of a rank. With more ranks than heads, neighbours hold the same one."""
    part = dims.attn_tp_rank(rank)
    first = part * model.num_kv_heads // dims.attn_tp
    return range(first, first + max(1, model.num_kv_heads // dims.attn_tp))


def params(model: NemotronH, dims: EngineDims, rank: int) -> list[Param]:
    """Everything a rank hosts, in a fixed order. MTP blocks are not part of the engine."""
    check_layout(model, dims)
    return slices(model, dims, rank)


def slices(model: NemotronH, dims: EngineDims, rank: int) -> list[Param]:
    """The same for a layout that holds in parts only: what comes out even is right."""
    parts, part = dims.attn_tp, dims.attn_tp_rank(rank)
    hidden = (model.hidden_size,)
    vocab = _share(model.vocab_size, parts, part)
    found = [_rows("embeddings", [("backbone.embeddings.weight", vocab)], hidden)]
    for index, kind in enumerate(model.pattern):
        here, there = f"layers.{index}.", f"backbone.layers.{index}."
        found.append(_rows(here + "norm", [(there + "norm.weight", range(model.hidden_size))]))
        build = {"M": _mamba, "*": _attention, "-": _dense, "E": _moe}[kind]
        found.extend(build(model, dims, rank, here, there + "mixer."))
    found.append(_rows("norm_f", [("backbone.norm_f.weight", range(model.hidden_size))]))
    found.append(_rows("lm_head", [("lm_head.weight", vocab)], hidden))
    return found


def _share(size: int, parts: int, part: int, offset: int = 0) -> range:
    """The rows of one of `parts` equal parts of `size` rows that begin at `offset`."""
    return range(offset + size * part // parts, offset + size * (part + 1) // parts)


def _rows(
    name: str,
    pieces: Iterable[tuple[str, range]],
    tail: tuple[int, ...] = (),
    keep_fp32: bool = False,
) -> Param:
    """Row ranges of HF tensors, end to end; `tail` is the shape of one row."""
    segments = tuple(Segment(tensor, rows.start, rows.stop) for tensor, rows in pieces)
    shape = (sum(map(len, segments)), *tail)
    return Param(name, shape, keep_fp32, (Hosted(name, -1, 0, segments),))


def _cols(name: str, tensor: str, num_rows: int, cols: range) -> Param:
    segments = (Segment(tensor, cols.start, cols.stop),)
    return Param(name, (num_rows, len(cols)), False, (Hosted(name, -1, 1, segments),))


def _mlp(here: str, there: str, width: int, mine: range) -> list[Param]:
    return [
        _rows(f"{here}up", [(f"{there}up_proj.weight", mine)], (width,)),
        _cols(f"{here}down", f"{there}down_proj.weight", width, mine),
    ]


def _mamba(model: NemotronH, dims: EngineDims, rank: int, here: str, there: str) -> list[Param]:
    parts, part = dims.attn_tp, dims.attn_tp_rank(rank)
    inner, bc, heads = model.mamba_inner_size, model.mamba_bc_size, model.mamba_num_heads

    def pieces(tensor: str, sizes: list[int]) -> list[tuple[str, range]]:
        """This rank's share of each of the row blocks that make up an HF tensor."""
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            (there + tensor, _share(size, parts, part, offset))
            for size, offset in zip(sizes, offsets, strict=True)
        ]

    conv = [inner, bc, bc]
    return [
        _rows(
            here + "in_proj", pieces("in_proj.weight", [inner, *conv, heads]), (model.hidden_size,)
        ),
        _rows(here + "conv_weight", pieces("conv1d.weight", conv), (1, model.conv_kernel)),
        _rows(here + "conv_bias", pieces("conv1d.bias", conv)),
        _rows(here + "A_log", pieces("A_log", [heads]), keep_fp32=True),
        _rows(here + "D", pieces("D", [heads]), keep_fp32=True),
        _rows(here + "dt_bias", pieces("dt_bias", [heads]), keep_fp32=True),
        _rows(here + "gated_norm", pieces("norm.weight", [inner])),
        _cols(
            here + "out_proj",
            there + "out_proj.weight",
            model.hidden_size,
            _share(inner, parts, part),
        ),
    ]


def _attention(model: NemotronH, dims: EngineDims, rank: int, here: str, there: str) -> list[Param]:
    kv, width = kv_heads(model, dims, rank), model.head_dim
    queries = _share(model.num_heads * width, dims.attn_tp, dims.attn_tp_rank(rank))
    kv_rows = range(kv.start * width, kv.stop * width)
    pieces = [
        (there + "q_proj.weight", queries),
        (there + "k_proj.weight", kv_rows),
        (there + "v_proj.weight", kv_rows),
    ]
    return [
        _rows(here + "qkv", pieces, (model.hidden_size,)),
        _cols(here + "o_proj", there + "o_proj.weight", model.hidden_size, queries),
    ]


def _dense(model: NemotronH, dims: EngineDims, rank: int, here: str, there: str) -> list[Param]:
    mine = _share(model.dense_ffn_size, dims.attn_tp, dims.attn_tp_rank(rank))
    return _mlp(here, there, model.hidden_size, mine)


def _moe(model: NemotronH, dims: EngineDims, rank: int, here: str, there: str) -> list[Param]:
    num, width, latent = model.num_experts, model.hidden_size, model.latent_size
    found = [
        _rows(here + "gate", [(there + "gate.weight", range(num))], (width,)),
        _rows(
            here + "correction_bias",
            [(there + "gate.e_score_correction_bias", range(num))],
            keep_fp32=True,
        ),
    ]
    if latent:
        found += [
            _rows(
                here + "latent_in", [(there + "fc1_latent_proj.weight", range(latent))], (width,)
            ),
            _rows(
                here + "latent_out", [(there + "fc2_latent_proj.weight", range(width))], (latent,)
            ),
        ]
    shared = _share(model.shared_ffn_size, dims.attn_tp, dims.attn_tp_rank(rank))
    found += _mlp(here + "shared_", there + "shared_experts.", width, shared)

    mine = _share(num, dims.ep, dims.ep_rank(rank))
    ffn = _share(model.expert_ffn_size, dims.expert_tp, dims.expert_tp_rank(rank))
    for name, dim in (("up", 0), ("down", 1)):
        matrices = [f"{there}experts.{expert}.{name}_proj.weight" for expert in mine]
        found.append(_stack(f"{here}experts_{name}", matrices, ffn, dim, model.expert_width))
    return found


def _stack(name: str, matrices: Sequence[str], ffn: range, dim: int, width: int) -> Param:
    """One matrix of each of a rank's experts, stacked: [E, I, w] for up, [E, w, I] for down."""
    hosted = tuple(
        Hosted(name, local, dim, (Segment(tensor, ffn.start, ffn.stop),))
        for local, tensor in enumerate(matrices)
    )
    matrix = (len(ffn), width) if dim == 0 else (width, len(ffn))
    return Param(name, (len(hosted), *matrix), False, hosted)
