"""Full recompute of a hybrid stack: layers keep their input and run again for the backward pass.

Megatron-core's stacks know `recompute_granularity: full` from 0.19 on; older ones ignore it without
a word, and then it is done here, layer by layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute_layers(stack: Any) -> None:
    """Make the layers that `stack.config` names recompute, unless the stack does so itself."""
    config = stack.config
    if config.recompute_granularity != "full" or _knows_it(type(stack)):
        return
    chosen = list(stack.layers)
    if config.recompute_method == "block":  # the first so many, one by one
        chosen = chosen[: config.recompute_num_layers]
    elif config.recompute_num_layers != 1:
        raise ValueError(
            f"megatron.recompute_num_layers = {config.recompute_num_layers} with method uniform: "
            "this megatron-core has no full recompute for hybrids, and ours is layer by layer: "
            "set it to 1"
        )
    for layer in chosen:
        layer.forward = partial(_recomputed, layer.forward)


def _knows_it(stack: type) -> bool:
    return "recompute_granularity" in inspect.getsource(stack)


def _recomputed(forward: Callable[..., Any], hidden_states: Tensor, **rest: Any) -> Any:
    """No random numbers are drawn in a layer: dropout is 0."""
    if not torch.is_grad_enabled():
        return forward(hidden_states=hidden_states, **rest)

    def run(hidden: Tensor) -> Any:
        return forward(hidden_states=hidden, **rest)

    return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
