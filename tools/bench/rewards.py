"""How many answers a second the reward workers grade.

    python tools/bench/rewards.py [--workers 2] [--num 50000] [--file rewards/math.py]

Three kinds: plain numbers with a short response, plain numbers after 8000 characters of reasoning,
and formulas that need sympy. All answers differ, so none comes from the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from miles_lite.rollout.rewards import RewardWorkers

ROOT = Path(__file__).parents[2]


def answers(kind: str, num: int) -> list[tuple[str, str]]:
    """(response, label) pairs, all right and all different."""
    if kind == "formula":
        return [
            (f"</think>\\boxed{{(x+{i})^2}}", f"x^2+{2 * i}x+{i * i}") for i in range(2, num + 2)
        ]
    reasoning = "Let me think. " * (600 if kind == "long" else 1)
    return [(f"{reasoning}</think>so \\boxed{{{i}}}", str(i)) for i in range(1, num + 1)]


async def seconds(workers: RewardWorkers, pairs: Sequence[tuple[str, str]]) -> float:
    """Time to grade all of them at once. Raises RuntimeError if a right answer does not win."""
    start = time.perf_counter()
    verdicts = await asyncio.gather(*(workers.grade(*pair) for pair in pairs))
    elapsed = time.perf_counter() - start
    if lost := [pair for pair, verdict in zip(pairs, verdicts, strict=True) if not verdict.reward]:
        raise RuntimeError(f"{len(lost)} right answers did not win, such as {lost[0]}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description="grades per second of the reward workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num", type=int, default=50_000, help="of plain numbers")
    parser.add_argument("--file", type=Path, default=ROOT / "rewards" / "math.py")
    args = parser.parse_args()
    start = time.perf_counter()
    with RewardWorkers(args.file, args.file.stem, args.workers) as workers:
        print(f"{args.workers} workers started in {time.perf_counter() - start:.2f} s")
        for kind, num in (("plain", args.num), ("long", args.num // 5), ("formula", 400)):
            pairs = answers(kind, num)
            asyncio.run(seconds(workers, answers(kind, 2)))  # the slow imports
            elapsed = asyncio.run(seconds(workers, pairs))
            print(f"{kind:8} {num:6} grades  {num / elapsed:8.0f} /s")


if __name__ == "__main__":
    main()
