"""transformers' Nemotron-H, with its routers watched or forced: the reference of routing replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def routers(model: Any) -> list[Any]:
    """In the order of their layers."""
    return [m for _, m in model.named_modules() if hasattr(m, "e_score_correction_bias")]


@contextmanager
def forced(model: Any, choices: np.ndarray | None) -> Iterator[list[Tensor]]:
    """For the body, a pass over one sequence, its tokens go to `choices` [T - 1, L, K], the last
    one (or without any, all) to where the router would send it. Collects that: L tensors [T, K]."""
    own: list[Tensor] = []
    patched = routers(model)

    def forward(router: Any, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.view(-1, router.weight.shape[1]).float() @ router.weight.float().T
        scores = logits.sigmoid()
        best = (scores + router.e_score_correction_bias).topk(router.top_k, -1).indices
        own.append(best)
        if choices is not None:
            best = torch.cat([torch.from_numpy(choices[:, layer].astype(np.int64)), best[-1:]])
        weights = scores.gather(1, best)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * router.routed_scaling_factor, best

    for layer, router in enumerate(patched):
        router.forward = lambda hidden, r=router, i=layer: forward(r, i, hidden)
    try:
        yield own
    finally:
        for router in patched:
            del router.forward


def chosen(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[T - 1, L, K] as transformers' own, untouched routers choose."""
    found: list[Tensor] = []
    hooks = [
        r.register_forward_hook(lambda *args: found.append(args[-1][2])) for r in routers(model)
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1)[:-1].numpy()
