"""What layers save for their backward passes, tensor by tensor, as the fused layers of a GPU do.

T tokens of a micro-batch; with sequence parallelism a rank holds T / tp of them outside the parts
that tensor parallelism cuts.
"""

from __future__ import annotations

from math import ceil

from miles_lite.config import Config
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner.hardware import Hardware


def layer_bytes(
    model: NemotronH, kind: str, tokens: int, dims: ParallelDims, hardware: Hardware, width: int
) -> tuple[int, int]:
    """(bytes saved for the backward pass, bytes beside them while the layer runs), without
    recomputation."""
    hidden, tp = model.hidden_size, dims.tp
    local = ceil(tokens / tp)
    entry = 2 * local * hidden * width  # the layer's input, and normalised
    gathered = tokens * hidden * width if tp > 1 else 0
    if kind == "M":
        inner, bc = model.mamba_inner_size // tp, model.mamba_bc_size // tp
        projected = 2 * inner + 2 * bc + model.mamba_num_heads // tp
        # z, x, B, C, dt; then of the inner width: the scan, gated, normalised
        states = tokens * inner * model.ssm_state_size * 4 // model.chunk_size
        return entry + tokens * (projected + 3 * inner) * width, gathered + states
    if kind == "*":
        queries = model.num_heads // tp * model.head_dim
        keys = 2 * max(1, model.num_kv_heads // tp) * model.head_dim
        log_sums = tokens * model.num_heads // tp * 4
        return entry + tokens * (2 * queries + keys) * width + log_sums, gathered
    if kind == "-":
        return entry + 2 * tokens * (model.dense_ffn_size // tp) * width, gathered
    latent = 2 * local * model.latent_size * width  # before dispatch, after combine
    routed = local * model.num_experts * (3 * 4 + 1)  # logits, scores, weights in fp32; a mask
    shared = 2 * tokens * (model.shared_ffn_size // tp) * width
    sent = local * model.top_k
    received = ceil(sent * dims.expert_tp * hardware.assumed.expert_imbalance)
    ffn = model.expert_ffn_size // dims.expert_tp
    experts = received * (model.expert_width + 2 * ffn) * width
    on_their_way = (sent + 2 * received) * model.expert_width * width
    return entry + latent + routed + shared + experts, gathered + on_their_way


def recomputed(cfg: Config) -> str:
    """Which layer kinds keep only their input: "all", some of "E-*M", or none."""
    options = cfg.train.megatron
    granularity = options.get("recompute_granularity")
    if granularity == "full":
        return "all"
    if granularity == "selective":
        modules = options.get("recompute_modules") or ()
        return "".join(kind for kind, name in (("E", "moe"), ("-", "mlp")) if name in modules)
    return ""
