"""The phases of a step with engines that may be lost in any of them, and come back.

An engine that is lost gets new processes while the trainer holds nothing on the devices, as at the
start of the run, and the current weights with all others in a sync whose checksums are compared.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping

from miles_lite.cluster.actor import ask_each
from miles_lite.cluster.lease import Lease
from miles_lite.log import few
from miles_lite.protocols import EngineError, EnginesLost, Metrics, Phase, Rollout, Trainer

log = logging.getLogger(__name__)

MAX_LOSSES = 3  # of one engine within a step; one more ends the run


class Revival:
    """A Lease that outlives engines."""

    def __init__(self, trainer: Trainer, rollout: Rollout) -> None:
        self._trainer, self._rollout = trainer, rollout
        self._lease = Lease(trainer, rollout)
        self._losses: dict[str, list[str]] = defaultdict(list)  # since the last step, by engine
        self._num_restarts, self._lost_s = 0, 0.0  # of this step
        rollout.revive = self._in_generate

    def enter(self, phase: Phase) -> None:
        """See Lease. Raises EngineError when engines are lost again and again."""
        while True:
            try:
                return self._lease.enter(phase)
            except EnginesLost as lost:
                self._restart(lost.causes)
                if phase is Phase.generate:
                    self.enter(Phase.sync)
                    self.send_weights(self._rollout.version)

    def send_weights(self, version: int) -> Metrics:
        """See Trainer; in Phase.sync."""
        while True:
            try:
                return self._trainer.send_weights(self._rollout, version)
            except EnginesLost as lost:
                self._restart(lost.causes)
                self.enter(Phase.sync)

    def metrics(self) -> Metrics:
        """Of the step that is done. Losses are counted anew from here."""
        told = self._lease.metrics() | {
            "perf/engine_restarts": float(self._num_restarts),
            "perf/engine_recovery_time": self._lost_s,
        }
        self._num_restarts, self._lost_s = 0, 0.0
        self._losses.clear()
        return told

    def _in_generate(self, causes: Mapping[str, str]) -> None:
        """Implements Rollout.revive."""
        begin, before = time.perf_counter(), self._lost_s
        self._restart(causes)
        self.enter(Phase.sync)
        self.send_weights(self._rollout.version)
        self.enter(Phase.generate)
        took = time.perf_counter() - begin
        self._lost_s = before + took
        log.warning("after %.1f s back with weights of their checksums: %s", took, few([*causes]))

    def _restart(self, causes: Mapping[str, str]) -> None:
        begin = time.perf_counter()
        while causes:
            for name, why in causes.items():
                self._losses[name].append(why)
                if len(self._losses[name]) > MAX_LOSSES:
                    told = "; ".join(f"({n}) {w}" for n, w in enumerate(self._losses[name], 1))
                    raise EngineError(
                        f"{name} was lost {len(self._losses[name])} times within a step: {told}"
                    )
                log.warning("restarting %s: %s", name, why)
            self._trainer.enter(Phase.generate)  # engines measure what is free when they come up
            self._num_restarts += len(causes)
            lost = [engine for engine in self._rollout.engines if engine.name in causes]
            causes = {}
            try:
                ask_each(lost, lambda engine: engine.restart())
            except EnginesLost as again:
                causes = again.causes
        self._lost_s += time.perf_counter() - begin
