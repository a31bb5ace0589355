"""Megatron's 1F1B pipeline schedule, played through: when each stage works, and what it holds.

Hybrid stacks have no interleaved stages, so there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Times = Sequence[Sequence[float]]  # [stage][micro-batch] seconds


@dataclass(frozen=True, slots=True)
class Timeline:
    seconds: float
    busy: tuple[float, ...]  # seconds that each stage works
    in_flight: tuple[int, ...]  # most micro-batches whose activations a stage holds at once

    @property
    def bubble(self) -> float:
        """Share of the time that stages wait, on average."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def order(stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[bool, int]]:
    """What a stage does, one after the other: (is it a backward pass, of which micro-batch)."""
    warm_up = min(num_stages - stage - 1, num_micro_batches)
    steps = [(False, i) for i in range(warm_up)]
    for i in range(warm_up, num_micro_batches):
        steps += [(False, i), (True, i - warm_up)]
    return steps + [(True, i) for i in range(num_micro_batches - warm_up, num_micro_batches)]


def simulate(forward: Times, backward: Times | None, hop_s: float) -> Timeline:
    """One update, or with `backward` None one pass without gradients.

    A pass waits for its input from the neighbour, which takes hop_s, and for the pass before it.
    """
    num_stages, num_micro_batches = len(forward), len(forward[0])
    todo = [order(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    if backward is None:
        todo = [[step for step in steps if not step[0]] for steps in todo]
    done: dict[tuple[bool, int, int], float] = {}  # (backward, stage, micro-batch) -> end
    clock, held, most = [0.0] * num_stages, [0] * num_stages, [0] * num_stages
    position = [0] * num_stages
    while any(position[s] < len(todo[s]) for s in range(num_stages)):
        before = list(position)
        for stage in range(num_stages):
            while position[stage] < len(todo[stage]):
                back, index = todo[stage][position[stage]]
                source = stage + 1 if back else stage - 1
                is_end = source == num_stages if back else source < 0
                if not is_end and (back, source, index) not in done:
                    break
                ready = 0.0 if is_end else done[back, source, index] + hop_s
                times = backward if back and backward is not None else forward
                clock[stage] = max(clock[stage], ready) + times[stage][index]
                done[back, stage, index] = clock[stage]
                held[stage] += -1 if back else 1
                most[stage] = max(most[stage], held[stage])
                position[stage] += 1
        assert position != before, "a schedule of 1F1B never waits for itself"
    busy = tuple(
        sum(forward[s]) + (sum(backward[s]) if backward is not None else 0.0)
        for s in range(num_stages)
    )
    return Timeline(max(clock), busy, tuple(most) if backward is not None else (1,) * num_stages)
