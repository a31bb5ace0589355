"""Watches that the rewards say something: a run that learns nothing should not go on for days."""

from __future__ import annotations

from collections.abc import Sequence

from miles_lite.algo.credit import dead_step_reason
from miles_lite.protocols import Metrics, RunError
from miles_lite.types import Group


class NoSignalError(RunError):
    """No answer told right from wrong for several steps in a row. Says the likely cause."""


class SignalWatch:
    """max_dead_steps: steps in a row that teach nothing which end the run; 0 never does.

    num_dead: how many there have been, part of the state of a run.
    """

    def __init__(self, max_dead_steps: int) -> None:
        self._max_dead_steps = max_dead_steps
        self.num_dead = 0

    def look(self, groups: Sequence[Group], metrics: Metrics) -> None:
        """At every step, with its rollout_metrics. Raises NoSignalError."""
        self.num_dead = 0 if metrics["rollout/taught_ratio"] else self.num_dead + 1
        if self._max_dead_steps and self.num_dead >= self._max_dead_steps:
            raise NoSignalError(
                f"{self.num_dead} steps in a row taught nothing of right and wrong: "
                f"{dead_step_reason(groups)}. `miles-lite reward-audit` tells more; "
                "reward.max_dead_steps=0 goes on regardless"
            )
