"""What one sequence costs to compute, in floating-point operations; a multiply-add counts as two.

Matrix products only: norms, activations and softmax are memory traffic, a few per cent at most.
"""

from __future__ import annotations

from miles_lite.models.nemotron_h import NemotronH


def forward_flops(model: NemotronH, seq_len: int) -> int:
    """Of a forward pass over a sequence of that many tokens, the output layer included.

    All but attention is linear in the length; causal attention looks at T (T + 1) / 2 pairs.
    """
    per_token = sum(_layer_macs(model, kind) for kind in model.pattern)
    per_token += model.hidden_size * model.vocab_size
    pairs = seq_len * (seq_len + 1) // 2
    per_pair = 2 * model.num_heads * model.head_dim * model.pattern.count("*")  # scores, values
    return 2 * (per_token * seq_len + per_pair * pairs)


def output_flops(model: NemotronH, num_tokens: int) -> int:
    """Of the output layer for so many tokens: what `forward_flops` has too much of where only some
    tokens are followed by one to predict."""
    return 2 * model.hidden_size * model.vocab_size * num_tokens


def train_flops(model: NemotronH, seq_len: int) -> int:
    """Of a log-prob pass and an update: the backward pass costs twice the forward one."""
    return 4 * forward_flops(model, seq_len)


def _layer_macs(model: NemotronH, kind: str) -> int:
    """Multiply-adds per token of one layer, without attention's pairs."""
    hidden = model.hidden_size
    match kind:
        case "M":
            inner, bc = model.mamba_inner_size, model.mamba_bc_size
            projected = hidden * (2 * inner + 2 * bc + model.mamba_num_heads)
            convolved = model.conv_kernel * (inner + 2 * bc)
            # in chunks: causal pairs within one, then the state in and out
            scanned = model.chunk_size // 2 * (bc + inner) + 2 * inner * model.ssm_state_size
            return projected + convolved + scanned + inner * hidden
        case "*":
            heads = 2 * model.num_heads + 2 * model.num_kv_heads  # q and output, k and v
            return hidden * heads * model.head_dim
        case "E":
            latent = 2 * hidden * model.latent_size  # down and up again; 0 without
            routed = model.top_k * 2 * model.expert_width * model.expert_ffn_size
            shared = 2 * hidden * model.shared_ffn_size
            return hidden * model.num_experts + latent + routed + shared
        case "-":
            return 2 * hidden * model.dense_ffn_size
    raise AssertionError(f"no layer kind {kind!r}")
