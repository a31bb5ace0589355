"""Routing replay (R3, arXiv 2510.11370): tokens go to the experts that the engine chose for them.

An engine and a trainer of equal weights round differently, and now and then that tips a router: an
expert more or less is the largest part of their drift. With replay the trainer's routers take the
engine's choice; the weights of the chosen stay the trainer's own scores, so gradients reach the
router as ever. The last token of a sequence was never read by the engine: it takes its own router's
choice. It has no loss and nothing comes after it, so nothing depends on that.

Megatron's routers ask a RouterReplay, if they have one, whenever they choose. Import only after
cpu_compat.install().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as groups
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor, nn

from miles_lite.algo.routing import RouterSizes, choices, end_to_end
from miles_lite.metrics import Mean, Partial
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.trainer.megatron.model import unwrap
from miles_lite.types import MicroBatch, TrainSequence

FLIP_RATE = "train/routing_flip_rate"  # share of (token, layer) whose set of experts would differ


class Replay(RouterReplay):
    """What one router is to choose. Megatron's own, but for tokens without a target, and it counts
    where the router would have chosen otherwise."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.counted: Tensor | None = None  # [T] tokens at which flips are counted
        self.flips = torch.zeros(2, dtype=torch.long, device=device)  # differing, compared

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts [T, K] of tokens with `scores` [T, E]; T is this TP rank's share."""
        assert default_compute_topk is not None
        own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            target = self.target_topk_idx
        elif self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            target = self.replay_backward_list.pop(0)
        else:
            return own
        assert target is not None and len(target) == len(scores), "targets of another micro-batch"
        target = target.long()
        known = target[:, :1] >= 0
        chosen = torch.where(known, target, own[1])
        if self.counted is not None:
            differ = (chosen.sort(-1).values != own[1].sort(-1).values).any(-1)
            compared = self.counted & known[:, 0]
            self.flips += torch.stack([(differ & compared).sum(), compared.sum()])
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """The replay of this rank's pipeline stage; with `algo.routing_replay` off, of no router."""

    def __init__(self, module: nn.Module, model: NemotronH, device: torch.device) -> None:
        stage = unwrap(module)
        self.active = bool(getattr(stage.config, "moe_enable_routing_replay", False))
        self._device, self._sizes, self._config = device, RouterSizes.of(model), stage.config
        layers = stage.decoder.layers
        first = groups.get_pipeline_model_parallel_rank() * len(layers)
        here = model.pattern[first : first + len(layers)]
        before = model.pattern[:first].count("E")
        self._layers = slice(before, before + here.count("E"))  # of those with experts
        self._replays: list[Replay] = []
        if self.active:
            for layer, kind in zip(layers, here, strict=True):
                if kind == "E":
                    self._replays.append(Replay(device))
                    layer.mlp.router.router_replay = self._replays[-1]

    @contextmanager
    def forward(self, micro_batch: MicroBatch, num_tokens: int, train: bool) -> Iterator[None]:
        """For the body, a forward pass of `micro_batch` packed to `num_tokens`, routers take the
        engine's choice. Raises ValueError, naming the sample, for one that cannot be replayed.

        Pipelines have several micro-batches on their way, so targets are set at each forward pass;
        a recomputation takes them in the order of the forward passes, which is that of backward.
        A pass without training counts flips, in sequences that are trained on.
        """
        if self._replays:
            targets = self._targets(micro_batch, num_tokens, thorough=not train)
            counted = None if train else self._trained(micro_batch, num_tokens)
            for replay, target in zip(self._replays, targets.unbind(1), strict=True):
                replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
                replay.counted = counted
                replay.set_target_indices(target)
                if not (train and self._recomputes):
                    replay.replay_backward_list.clear()
        yield
        for replay in self._replays:
            # outside of forward passes routers are only called to recompute one
            replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def finish(self) -> None:
        """All passes are done: routers choose for themselves again."""
        for replay in self._replays:
            replay.clear_router_replay_action()
            replay.clear_indices()

    def flips(self) -> dict[str, Partial]:
        """Of the passes without training since the last call, by this rank's tokens and layers."""
        if not self._replays:
            return {}
        differ, compared = map(sum, zip(*self._take_flips(), strict=True))
        return {FLIP_RATE: Mean(differ, compared)}

    def flips_by_layer(self) -> list[float]:
        """The same as the share of each layer with experts."""
        return [differ / max(1, compared) for differ, compared in self._take_flips()]

    def _take_flips(self) -> list[list[int]]:
        """[layer] of flips and what was compared, since the last call."""
        if not self._replays:
            return []
        counts = torch.stack([replay.flips for replay in self._replays]).tolist()
        for replay in self._replays:
            replay.flips.zero_()
        return counts

    @property
    def _recomputes(self) -> bool:
        """Whether backward runs the routers again."""
        config: Any = self._config
        if config.recompute_granularity == "selective":
            return "moe" in config.recompute_modules
        return config.recompute_granularity == "full"

    def _targets(self, micro_batch: MicroBatch, num_tokens: int, thorough: bool) -> Tensor:
        """int16 [T, layers of this stage, K] of the tokens of this rank."""
        for sequence in micro_batch.sequences:
            self._check(sequence, thorough)
        packed = end_to_end(micro_batch.sequences, num_tokens, self._layers, self._sizes.top_k)
        return self._own_tokens(torch.from_numpy(packed))

    def _trained(self, micro_batch: MicroBatch, num_tokens: int) -> Tensor:
        """[T] of the tokens of this rank; the rest of the micro-batch keeps ranks in step."""
        trained = torch.zeros(num_tokens, dtype=torch.bool)
        lens = torch.tensor([len(sequence.tokens) for sequence in micro_batch.sequences])
        weighs = torch.tensor([weight > 0 for weight in micro_batch.token_weights])
        trained[: micro_batch.num_tokens] = weighs.repeat_interleave(lens)
        return self._own_tokens(trained)

    def _own_tokens(self, packed: Tensor) -> Tensor:
        """Of all tokens those that this rank's routers see: a share, with tensor parallelism."""
        if self._config.sequence_parallel:
            share = len(packed) // groups.get_tensor_model_parallel_world_size()
            packed = packed.narrow(0, groups.get_tensor_model_parallel_rank() * share, share)
        return packed.to(self._device)

    def _check(self, sequence: TrainSequence, thorough: bool) -> None:
        fault = self._sizes.shape_fault(sequence.routing, len(sequence.tokens))
        if not fault and thorough:
            fault = self._sizes.choice_fault(choices(sequence.routing)[:, self._layers])
        if fault:
            raise ValueError(f"sample {sequence.sample} cannot be replayed: {fault}")
