"""Which of several engines, or groups of an engine's ranks, takes which request."""

from __future__ import annotations

from collections.abc import Sequence


def deal(
    prompts: Sequence[tuple[int, ...]], costs: Sequence[int], loads: Sequence[int]
) -> list[int]:
    """The taker of each request. Loads become even, so that none is idle while another sets the
    time of all; and as far as they do, requests of a prompt that follow each other go to one taker,
    which reads it once.

    prompts, costs: of the requests, in order. loads: what each taker has already, in the same unit.
    """
    load = list(loads)
    even = -(-(sum(load) + sum(costs)) // len(load))
    takers: list[int] = []
    reader: dict[tuple[int, ...], int] = {}
    for prompt, cost in zip(prompts, costs, strict=True):
        taker = reader.get(prompt)
        if taker is None or load[taker] + cost > even:
            taker = reader[prompt] = load.index(min(load))
        load[taker] += cost
        takers.append(taker)
    return takers
