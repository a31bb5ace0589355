"""One training step on one rank: old log-probs, drift, then the updates, in Megatron's schedules.

Import only after cpu_compat.install().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from miles_lite.algo.drift import first_log_ratio, rollout_drift, update_drift
from miles_lite.algo.losses import LogProbs, LossSettings, policy_loss, responses
from miles_lite.config import AlgoConfig
from miles_lite.metrics import ABS_DIFF, Max, Mean, Partial, Sum, merge
from miles_lite.protocols import TokenValues
from miles_lite.trainer.megatron.forward import forward_step, packed
from miles_lite.trainer.megatron.messages import RankReport
from miles_lite.trainer.megatron.model import unwrap
from miles_lite.trainer.megatron.optimizer import NonFiniteNorm, Optimizer
from miles_lite.trainer.megatron.replay import RoutingReplay
from miles_lite.trainer.megatron.token_credit import Facts, Known, token_credit
from miles_lite.types import MicroBatch

Share = Sequence[Sequence[MicroBatch]]  # [update][micro-batch] of one DP rank


@dataclass(frozen=True, slots=True)
class Settings:
    algo: AlgoConfig
    temperature: float
    chunk_tokens: int  # fp32 logits exist for this many tokens at a time


class Step:
    """Trains `ddp` on one DP rank's share of a batch.

    reference: host copies of the frozen reference's parameters by position, or () without KL.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: Optimizer,
        replay: RoutingReplay,
        settings: Settings,
        reference: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self._ddp = ddp
        self._optimizer = optimizer
        self._replay = replay
        self._settings = settings
        self._reference = reference
        self._device = device
        self._run_schedule = get_forward_backward_func()
        # every TP rank of the last stage computes the same losses: one of them speaks for all
        self._computes_loss = groups.is_pipeline_last_stage()
        self._reports = self._computes_loss and groups.get_tensor_model_parallel_rank() == 0

    def __call__(self, share: Share) -> RankReport:
        begin = time.perf_counter()
        # of one update the old policy is the current one: its own forward pass tells the log-probs
        on_policy = len(share) == 1 and not self._settings.algo.scores_first
        scored = [
            [] if on_policy else self._forward_only(micro_batches, replayed=True)
            for micro_batches in share
        ]
        old = [_logprobs(outputs) for outputs in scored]
        after_old = time.perf_counter()
        # every rank has tokens and layers of its own to tell of
        routing = merge(self._replay.flips(), self._drift_of_replay(share, old))
        begin_reference = time.perf_counter()
        reference = self._reference_logprobs(share)
        times = {"perf/log_probs_time": Max(after_old - begin)}
        if self._replay.active:
            times["perf/no_replay_time"] = Max(begin_reference - after_old)
        if self._reference:
            times["perf/ref_log_probs_time"] = Max(time.perf_counter() - begin_reference)
        known = self._know(share, old, reference)
        begin_train = time.perf_counter()
        report: dict[str, Partial] = {}
        broken = ""
        for index, (micro_batches, facts) in enumerate(zip(share, known, strict=True)):
            told, outputs, broken = self._update(micro_batches, facts, is_first=index == 0)
            report = merge(report, told)
            if on_policy:
                scored = [outputs]
                old = [_logprobs(outputs)]
                known = [[replace(k, old=o) for k, o in zip(facts, old[0], strict=True)]]
            if broken:
                break
        times["perf/actor_train_time"] = Max(time.perf_counter() - begin_train)
        if not self._reports:
            return RankReport(merge(routing, times), {}, {}, broken)
        report = merge(report, *(_before_training(each) for each in chain.from_iterable(known)))
        entropies = [[out[1] for out in outputs] for outputs in scored]
        logprobs, entropies = _by_sample(share, old), _by_sample(share, entropies)
        return RankReport(merge(report, routing, times), logprobs, entropies, broken)

    def refresh_reference(self) -> None:
        """From now on the KL is to the policy as it is."""
        params = self._ddp.module.parameters()
        for frozen, param in zip(self._reference, params, strict=True):
            frozen.copy_(param.data)

    def score(self, micro_batches: Sequence[MicroBatch], replayed: bool = False) -> TokenValues:
        """Log-probs of the answers under the policy as it is, its own routing
        included unless the engine's is replayed."""
        logprobs = _logprobs(self._forward_only(micro_batches, replayed))
        return _by_sample([micro_batches], [logprobs]) if self._reports else {}

    def look_inside(
        self, micro_batch: MicroBatch
    ) -> tuple[np.ndarray, list[torch.Tensor], list[float]]:
        """With routes replayed: log-probs of the first sequence, fp32 hidden states [T, H] behind
        each layer, and the share of tokens each router would have sent elsewhere. Of one rank that
        is the whole trainer."""
        hidden: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, inputs: object, out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            hidden.append(states.detach()[:, 0].float().cpu())

        layers = unwrap(self._ddp).decoder.layers
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            logprobs = self.score([micro_batch], replayed=True)
        finally:
            for hook in hooks:
                hook.remove()
        return logprobs[micro_batch.sequences[0].sample], hidden, self._replay.flips_by_layer()

    # -------------------------------------------------------------- forward only

    def _forward_only(
        self, micro_batches: Sequence[MicroBatch], replayed: bool = False
    ) -> list[torch.Tensor]:
        """Log-probs and entropies [2, N] of each micro-batch; none on ranks that have none."""
        self._ddp.eval()
        with torch.no_grad():
            outputs = self._schedule(
                micro_batches, lambda _: lambda out: (out.new_zeros(()), out), replayed
            )
        self._ddp.train()
        return [output.clone() for output in outputs]

    def _reference_logprobs(self, share: Share) -> list[list[torch.Tensor]]:
        """As _forward_only under the frozen reference's weights; the policy's are put back. It
        routes for itself: forced to another's choices it would be another policy."""
        if not self._reference:
            return [[] for _ in share]
        params = list(self._ddp.module.parameters())
        policy = [p.data.to("cpu", copy=True) for p in params]
        for param, frozen in zip(params, self._reference, strict=True):
            param.data.copy_(frozen)
        logprobs = [_logprobs(self._forward_only(micro_batches)) for micro_batches in share]
        for param, own in zip(params, policy, strict=True):
            param.data.copy_(own)
        return logprobs

    def _drift_of_replay(self, share: Share, old: list[list[torch.Tensor]]) -> dict[str, Partial]:
        """The drift with and without replay, of the same tokens: those of a rank's first
        micro-batch, so it costs one more forward pass and not one of all."""
        if not self._replay.active:
            return {}
        logprobs = _logprobs(self._forward_only(share[0][:1]))
        if not self._reports:
            return {}
        known = Known(share[0][0], responses(share[0][0], self._device), old[0][0], None)
        engine = known.of_trained(known.seen.rollout_logprobs)
        drift = {
            name: rollout_drift(known.of_trained(ours), engine, known.trained_lengths)[ABS_DIFF]
            for name, ours in (("replayed", old[0][0]), ("no_replay", logprobs[0]))
        }
        return {f"{ABS_DIFF}_{name}": value for name, value in drift.items()}

    def _know(
        self, share: Share, old: list[list[torch.Tensor]], reference: list[list[torch.Tensor]]
    ) -> Facts:
        """All that the updates need. Only the last pipeline stage knows anything; there it is a
        collective over DP ranks."""
        if not self._computes_loss:
            return [[] for _ in share]
        none = repeat(None)
        facts: Facts = [
            [
                Known(m, responses(m, self._device), o, r)
                for m, o, r in zip(micro_batches, ours or none, theirs or none, strict=False)
            ]
            for micro_batches, ours, theirs in zip(share, old, reference, strict=True)
        ]
        return token_credit(facts, self._settings.algo)

    # -------------------------------------------------------------- one update

    def _update(
        self, micro_batches: Sequence[MicroBatch], facts: Sequence[Known], is_first: bool
    ) -> tuple[dict[str, Partial], list[torch.Tensor], str]:
        """What it tells, log-probs and entropies [2, N] of its forward pass, and what of it is not
        finite: then every rank says so, and no weight was changed."""
        self._ddp.zero_grad_buffer()
        self._optimizer.inner.zero_grad()
        parts: list[dict[str, Partial]] = []
        outputs: list[torch.Tensor] = []
        algo, loss_settings = self._settings.algo, LossSettings.of(self._settings.algo)
        # Megatron averages over micro-batches and DP ranks; token weights already normalise
        scale = len(micro_batches) * groups.get_data_parallel_world_size()

        def loss_of(index: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
            def loss(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                known, seen = facts[index], facts[index].seen
                engine = seen.rollout_logprobs
                outputs.append(out.detach())
                own = outputs[-1][0].clone() if known.old is None else known.old
                logprobs = LogProbs(
                    current=out[0],
                    old=own if algo.old_logprobs == "trainer" else engine,
                    rollout=engine,
                    reference=known.reference,
                    entropy=out[1],
                )
                value, metrics = policy_loss(
                    logprobs, seen.advantages, seen.weights, seen.lengths, loss_settings
                )
                parts.append(metrics)
                current, before = (known.of_trained(x) for x in (out[0].detach(), logprobs.old))
                parts.append(update_drift(current, before, known.trained_lengths))
                if is_first and algo.old_logprobs == "trainer":
                    parts.append(first_log_ratio(current, before))
                # the schedule divides the returned loss in place: it gets one of its own
                return value * scale, value.detach()

            return loss

        losses = self._schedule(micro_batches, loss_of, replayed=True, train=True)
        told = merge(*_mean_over_updates(parts)) if self._reports else {}
        if broken := self._non_finite_loss(losses):
            return told, outputs, broken
        lr = self._optimizer.learning_rate()
        try:
            norm = self._optimizer.step()
        except NonFiniteNorm as error:
            norm, broken = error.norm, str(error)
        shared: dict[str, Partial] = {"train/grad_norm": Mean(norm, 1), "train/lr-pg_0": Max(lr)}
        return merge(shared, told) if self._reports else {}, outputs, broken

    def _non_finite_loss(self, losses: Sequence[torch.Tensor]) -> str:
        """Agreed on by all ranks, so that every rank stops here and names the same cause."""
        broken = any(not bool(torch.isfinite(loss)) for loss in losses)
        flag = torch.tensor([float(broken)], device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return "a loss is NaN or infinite; no weight was changed" if flag.item() else ""

    def _schedule(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_of: Callable[[int], Callable],
        replayed: bool,
        train: bool = False,
    ) -> list[torch.Tensor]:
        """Run Megatron's schedule; what loss functions returned second, by micro-batch."""
        tp = groups.get_tensor_model_parallel_world_size()
        settings, plain = self._settings, nullcontext()

        def one(iterator: Iterator[int], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            index = next(iterator)
            inputs = packed(micro_batches[index], tp, self._device)
            num_tokens, replay = inputs.tokens.shape[1], self._replay
            with replay.forward(micro_batches[index], num_tokens, train) if replayed else plain:
                out = forward_step(model, inputs, settings.temperature, settings.chunk_tokens)
            return out, loss_of(index)

        found = self._run_schedule(
            forward_step_func=one,
            data_iterator=iter(range(len(micro_batches))),
            model=[self._ddp],
            num_microbatches=len(micro_batches),
            seq_length=1,  # shapes vary: stages tell each other
            micro_batch_size=1,
            forward_only=not train,
        )
        self._replay.finish()
        return found


def _mean_over_updates(parts: list[dict[str, Partial]]) -> Iterator[dict[str, Partial]]:
    """Sums over an update's micro-batches and ranks are means of that update: keep the divisor.

    Each DP rank adds its part of the sum; only one of them may add the 1 to the divisor.
    """
    counts = 1.0 if groups.get_data_parallel_rank() == 0 else 0.0
    for name, partial in merge(*parts).items():
        if isinstance(partial, Sum) and name != "train/nonfinite_logprobs":
            yield {name: Mean(partial.value, counts)}
        else:
            yield {name: partial}


def _before_training(known: Known) -> dict[str, Partial]:
    """Trainer against engine: same weights, same tokens, before anything is trained; and what the
    loss is going to use as advantages."""
    assert known.old is not None
    ours, engine = known.of_trained(known.old), known.of_trained(known.seen.rollout_logprobs)
    means = {
        "rollout/log_probs": ours,
        "rollout/rollout_log_probs": engine,
        "rollout/advantages": known.of_trained(known.seen.advantages),
    }
    if known.reference is not None:
        means["rollout/ref_log_probs"] = known.of_trained(known.reference)
    lengths = known.trained_lengths
    return merge(
        rollout_drift(ours, engine, lengths),
        {name: _sample_mean(values, lengths) for name, values in means.items()},
    )


def _sample_mean(values: torch.Tensor, lengths: Sequence[int]) -> Mean:
    """Mean over samples of the mean over their tokens."""
    means = [v.double().mean() for v in values.split(list(lengths)) if v.numel()]
    return Mean(float(sum(means)), len(means))


def _logprobs(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [output[0] for output in outputs]


def _by_sample(share: Share, rows: list[list[torch.Tensor]]) -> TokenValues:
    found = {}
    for micro_batches, outputs in zip(share, rows, strict=True):
        for micro_batch, values in zip(micro_batches, outputs, strict=True):
            lengths = [sequence.response_len for sequence in micro_batch.sequences]
            parts = values.float().cpu().split(lengths)
            for sequence, one in zip(micro_batch.sequences, parts, strict=True):
                found[sequence.sample] = one.numpy()
    return found
