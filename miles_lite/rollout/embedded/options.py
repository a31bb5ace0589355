"""Sizes and deadlines of an embedded engine, and which requests can be served at all."""

from __future__ import annotations

from dataclasses import dataclass

from miles_lite.models.nemotron_h import NemotronH
from miles_lite.types import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    dtype: str = "float32"  # of weights, activations, keys and values; state-space state is fp32
    device: str = "cpu"  # "cpu", "cuda" or "cuda:0"
    max_running: int = 64  # cache slots of each data-parallel group
    max_seq_len: int = 2048  # tokens of a slot: prompt and completion
    prefill_tokens: int = 4096  # most prompt tokens, padding included, read in one step
    timeout_s: float = 120.0  # for a peer rank to reach the next collective
    stall_s: float = 60.0  # of a step, or of any answer of a rank

    def check(self, request: Request, model: NemotronH) -> None:
        """ValueError for a request that can never be served."""
        sampling, prompt = request.sampling, request.tokens
        name = f"request {request.uid}"
        if not prompt:
            raise ValueError(f"{name} has an empty prompt")
        if sampling.max_new_tokens < 1:
            raise ValueError(
                f"{name}: max_new_tokens = {sampling.max_new_tokens}, must be positive"
            )
        if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(
                f"{name}: temperature = {sampling.temperature} and top_k = {sampling.top_k} must "
                f"not be negative, top_p = {sampling.top_p} must be in (0, 1]"
            )
        if len(prompt) + sampling.max_new_tokens > self.max_seq_len:
            raise ValueError(
                f"{name} can never fit: {len(prompt)} prompt tokens + max_new_tokens = "
                f"{sampling.max_new_tokens} exceed max_seq_len = {self.max_seq_len}"
            )
        if request.scored and len(request.scored) != sampling.max_new_tokens:
            raise ValueError(
                f"{name}: {len(request.scored)} tokens to score and max_new_tokens = "
                f"{sampling.max_new_tokens}: they must be as many"
            )
        tokens = prompt + request.scored
        if not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
            raise ValueError(
                f"{name} has token ids {min(tokens)} .. {max(tokens)}; vocab_size is "
                f"{model.vocab_size}"
            )
