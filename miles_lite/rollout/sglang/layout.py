"""Which slice of which HF tensor a rank of an SGLang engine hosts, under SGLang's own names.

The same slices as in `rollout.layout`, but for these: SGLang gathers the tokens of all DP groups
before dense and shared MLPs and the head, and so cuts those over all ranks; the vocabulary is
padded; A_log is kept as A; D and dt_bias are kept in the model's dtype. A test holds every tensor
of every rank to what SGLang's own loader makes of the same checkpoint. Read from SGLang 0.5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Form
from miles_lite.rollout.layout import Param, check_layout, slices

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCAB_MULTIPLE = 64  # to which SGLang pads the rows of embedding and head before it cuts them

_NAMES = {
    "norm": "norm.weight",
    "in_proj": "mixer.in_proj.weight",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "A_log": "mixer.A",
    "D": "mixer.D",
    "dt_bias": "mixer.dt_bias",
    "gated_norm": "mixer.norm.weight",
    "out_proj": "mixer.out_proj.weight",
    "qkv": "mixer.qkv_proj.weight",
    "o_proj": "mixer.o_proj.weight",
    "up": "mixer.up_proj.weight",
    "down": "mixer.down_proj.weight",
    "gate": "mixer.gate.weight",
    "correction_bias": "mixer.gate.e_score_correction_bias",
    "latent_in": "mixer.fc1_latent_proj.weight",
    "latent_out": "mixer.fc2_latent_proj.weight",
    "shared_up": "mixer.shared_experts.up_proj.weight",
    "shared_down": "mixer.shared_experts.down_proj.weight",
    "experts_up": "mixer.experts.w13_weight",
    "experts_down": "mixer.experts.w2_weight",
}
_OVER_ALL_RANKS = {"up", "down", "shared_up", "shared_down"}
_FORMS = {"A_log": Form.decay, "D": Form.rounded, "dt_bias": Form.rounded}


@dataclass(frozen=True, slots=True)
class Cuts:
    """What options of SGLang change in how weights are cut."""

    head_in_group: bool = False  # the head over the ranks of a DP group
    shared_whole: bool = False  # shared experts whole on every rank

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Cuts:
        """`options` as in rollout.engine.sglang."""
        return cls(
            head_in_group=bool(options.get("enable_dp_lm_head")),
            shared_whole=options.get("moe_a2a_backend", "none") != "none",
        )


@functools.cache  # engines of one run are alike
def params(model: NemotronH, dims: EngineDims, rank: int, cuts: Cuts) -> Sequence[Param]:
    """Everything a rank hosts.

    Rows that only pad the vocabulary are part of a parameter's shape and hosted by nobody.
    """
    check_cuts(model, dims)
    in_group = slices(model, dims, rank)
    over_all = {p.name: p for p in slices(model, replace(dims, dp=1, ep=dims.tp), rank)}
    if cuts.shared_whole:
        whole = slices(replace(model, num_experts=1), EngineDims(1, 1, 1), 0)
        over_all |= {p.name: p for p in whole if ".shared_" in p.name}
    found = []
    for param in in_group:
        prefix, _, name = param.name.rpartition(".")
        if prefix:
            if name in _OVER_ALL_RANKS:
                param = over_all[param.name]
            param = _as(param, f"model.{prefix}.{_NAMES[name]}", _FORMS.get(name, Form.stored))
        elif name == "embeddings":
            param = _vocab(EMBEDDING, param, model, dims, rank)
        elif name == "lm_head":
            group = dims if cuts.head_in_group else replace(dims, dp=1)
            param = _vocab(HEAD, param, model, group, rank)
        else:
            param = _as(param, f"model.{name}.weight", Form.stored)
        assert not param.padded or param.name in (EMBEDDING, HEAD), (
            f"{param.name} is not filled by its slices"
        )
        found.append(param)
    return found


def check_cuts(model: NemotronH, dims: EngineDims) -> None:
    """Refuse what SGLang cannot cut evenly."""
    check_layout(replace(model, vocab_size=_padded(model, dims.attn_tp)), dims)
    wide = {}
    if "E" in model.pattern:
        wide["moe_shared_expert_intermediate_size"] = model.shared_ffn_size
    if "-" in model.pattern:
        wide["intermediate_size"] = model.dense_ffn_size
    for what, size in wide.items():
        if size % dims.tp:
            raise ValueError(
                f"{what} = {size} cannot be cut over the {dims.tp} ranks of an engine: SGLang "
                "spreads dense and shared MLPs over all of them; choose another engine tp"
            )


def _as(param: Param, name: str, form: Form) -> Param:
    hosted = tuple(replace(h, param=name, form=form) for h in param.hosted)
    return Param(name, param.shape, param.keep_fp32 and form is not Form.rounded, hosted)


def _padded(model: NemotronH, parts: int) -> int:
    """Rows of embedding and head with their padding, when `parts` ranks share them."""
    rows = _ceil(model.vocab_size, VOCAB_MULTIPLE)
    return rows if rows % parts == 0 else _ceil(model.vocab_size, VOCAB_MULTIPLE * parts)


def _ceil(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _vocab(name: str, param: Param, model: NemotronH, dims: EngineDims, rank: int) -> Param:
    """A rank's share of the padded vocabulary; the padding comes last."""
    rows = _padded(model, dims.attn_tp) // dims.attn_tp
    start = dims.attn_tp_rank(rank) * rows
    stop = min(start + rows, model.vocab_size)
    (hosted,) = param.hosted
    (segment,) = hosted.segments
    mine = tuple([replace(segment, start=start, stop=stop)] if start < stop else [])
    pieces = (replace(hosted, param=name, segments=mine),) if mine else ()
    return Param(name, (rows, *param.shape[1:]), False, pieces)
