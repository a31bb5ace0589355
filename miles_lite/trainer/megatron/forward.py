"""One packed micro-batch through the model: log-prob and entropy of every response token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from miles_lite.trainer.megatron.logprob import linear_logprob
from miles_lite.trainer.megatron.model import unwrap
from miles_lite.types import MicroBatch


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """Sequences end to end; T tokens in all, N of them in responses, in order of the sequences."""

    tokens: Tensor  # [1, T]
    position_ids: Tensor  # [1, T] within the own sequence
    loss_positions: Tensor  # [N] where a response token is predicted: the token before it
    targets: Tensor  # [N] the response tokens
    cu_seqlens: Tensor  # [S + 1] int32: where sequences begin, and T
    max_len: int  # of a sequence


def packed(micro_batch: MicroBatch, multiple: int, device: torch.device) -> PackedInputs:
    """Pack a micro-batch; T is padded to a multiple (of TP) by one more sequence, of padding.

    Without any sequence there is only padding, so that ranks that have none may keep in step.
    """
    sequences = micro_batch.sequences
    lens = [len(sequence.tokens) for sequence in sequences]
    total = sum(lens)
    padding = -total % multiple if total else multiple
    tokens = torch.tensor(list(chain.from_iterable(s.tokens for s in sequences)) + [0] * padding)

    seq_lens = torch.tensor(lens + [padding] * (padding > 0))
    ends = seq_lens.cumsum(0)
    seq_of = torch.repeat_interleave(seq_lens)  # [T]
    position_ids = torch.arange(len(tokens)) - (ends - seq_lens)[seq_of]
    # padding counts as a prompt: no response
    prompt_lens = torch.tensor([s.prompt_len for s in sequences] + [padding] * (padding > 0))
    assert (prompt_lens > 0).all(), "the first token of a sequence has no prediction"
    next_id = position_ids + 1
    predicts = (next_id >= prompt_lens[seq_of]) & (next_id < seq_lens[seq_of])
    loss_positions = predicts.nonzero().flatten()
    return PackedInputs(
        tokens=tokens[None].to(device),
        position_ids=position_ids[None].to(device),
        loss_positions=loss_positions.to(device),
        targets=tokens[loss_positions + 1].to(device),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32),
        max_len=int(seq_lens.max()),
    )


def forward_step(model: nn.Module, inputs: PackedInputs, temperature: float, chunk: int) -> Tensor:
    """What megatron's schedules want of a stage: hidden states [T, 1, H], or at the last stage the
    stacked log-probs and entropies [2, N] in fp32, equal on all its TP ranks.

    Fp32 logits exist for `chunk` tokens at a time. Gradients reach every TP rank's weights whole.
    """
    from megatron.core import parallel_state, tensor_parallel

    output = model(
        inputs.tokens, inputs.position_ids, None, packed_seq_params=_packed_seq_params(inputs)
    )
    stage = unwrap(model)
    if not stage.post_process:
        return output
    hidden = output.squeeze(0)  # [T, H], or [T / tp, H] under sequence parallelism
    if stage.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True
        )
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return torch.stack(
        linear_logprob(
            hidden.index_select(0, inputs.loss_positions),
            stage.output_layer.weight,
            inputs.targets,
            temperature,
            chunk,
            parallel_state.get_tensor_model_parallel_group(),  # pyright: ignore
        )
    )


def _packed_seq_params(inputs: PackedInputs) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    # from 0.17 on, without total_tokens Mamba's state silently runs on into the next sequence;
    # 0.16 finds out by itself
    has_total = "total_tokens" in {field.name for field in dataclasses.fields(PackedSeqParams)}
    total: dict[str, Any] = {"total_tokens": inputs.tokens.shape[1]} if has_total else {}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=inputs.cu_seqlens,
        cu_seqlens_kv=inputs.cu_seqlens,
        max_seqlen_q=inputs.max_len,
        max_seqlen_kv=inputs.max_len,
        **total,
    )
