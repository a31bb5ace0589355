"""How many answers a second the reward workers grade.

    python tools/bench/rewards.py [--workers 2] [--num 50000] [--rewards math dapo_math ...]
                                  [--json FILE]

Three kinds: plain numbers with a short response, plain numbers after 8000 characters of reasoning,
and formulas that need sympy. All answers differ, so none comes from the cache.
Then how long a step waits if some of its answers never end, sleeping or computing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from miles_lite.config import RewardFunction
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.types import Prompt

FOLDER = Path(__file__).parents[2] / "rewards"
REWARDS = ("deepscaler", "math", "dapo_math", "exact", "math_verify")
OPTIONS = {"exact": {"marker": "Answer: "}}
KNOW_NO_FORMULAS = ("dapo_math", "exact")
NUM_FORMULAS = 400


def answers(kind: str, num: int) -> list[tuple[Prompt, str]]:
    """(prompt, response) pairs, all right and all different, in a form that every reward reads."""
    pairs = []
    for i in range(2, num + 2):
        answer, label = str(i), str(i)
        if kind == "formula":
            answer, label = f"(x+{i})^2", f"x^2+{2 * i}x+{i * i}"
        reasoning = "Let me think. " * (600 if kind == "long" else 1)
        prompt = Prompt(f"{kind}:{i}", (), "", label, "", {})
        pairs.append((prompt, f"{reasoning}</think>So \\boxed{{{answer}}}.\nAnswer: {answer}"))
    return pairs


async def seconds(workers: RewardWorkers, pairs: Sequence[tuple[Prompt, str]]) -> float:
    """Time to grade all of them at once. Raises RuntimeError if a right answer does not win."""
    start = time.perf_counter()
    verdicts = await asyncio.gather(*(workers.grade(*pair) for pair in pairs))
    elapsed = time.perf_counter() - start
    lost = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward != 1]
    if lost:
        raise RuntimeError(f"{len(lost)} right answers did not win, such as {lost[0]}")
    return elapsed


def bench(name: str, num_workers: int, num: int) -> list[dict[str, Any]]:
    """A row of each kind of answer."""
    rows: list[dict[str, Any]] = []
    reward = RewardFunction(
        file=FOLDER / f"{name}.py", function=name, options=OPTIONS.get(name, {})
    )
    kinds = {"plain": num, "long": num // 5, "formula": NUM_FORMULAS}
    if name in KNOW_NO_FORMULAS:
        del kinds["formula"]
    with RewardWorkers({"": reward}, num_workers, RewardLimits()) as workers:
        for kind, size in kinds.items():
            pairs = answers(kind, num_workers + size)
            asyncio.run(seconds(workers, pairs[:num_workers]))  # the slow imports
            elapsed = asyncio.run(seconds(workers, pairs[num_workers:]))
            print(f"{name:12} {kind:8} {size:6} grades  {size / elapsed:8.0f} /s")
            rows.append({"reward": name, "kind": kind, "grades": size, "seconds": elapsed})
    return rows


STUCK = """
import time

def stuck(response, label):
    if response.startswith("sleep"):
        time.sleep(3600)
    elif response.startswith("compute"):
        9**9**9
    return 1.0
"""


def bench_stuck(
    num_workers: int, limit_s: float = 4.0, num_sound: int = 300
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stuck.py"
        file.write_text(STUCK)
        reward = RewardFunction(file=file, function="stuck")
        with RewardWorkers({"": reward}, num_workers, RewardLimits(timeout_s=limit_s)) as workers:
            cases = [("no", 0), *product(("sleep", "compute"), (8, 32, 100))]
            return [asyncio.run(race(workers, word, num, num_sound)) for word, num in cases]


async def race(workers: RewardWorkers, word: str, num_stuck: int, num_sound: int) -> dict[str, Any]:
    """Tell when the last sound answer and the last of all had their verdicts."""
    start = time.perf_counter()

    async def done_s(response: str) -> float:
        await workers.grade(Prompt("", (), "", "1", "", {}), response)
        return time.perf_counter() - start

    stuck = [f"{word} {num_stuck} {i}" for i in range(num_stuck)]
    sound = [f"sound {word} {num_stuck} {i}" for i in range(num_sound)]
    times = await asyncio.gather(*map(done_s, stuck + sound))
    sound_s, all_s = max(times[num_stuck:]), max(times)
    print(
        f"{num_sound} sound behind {num_stuck:3} that {word:7}, limit {workers.limits.timeout_s} s:"
        f"  sound {sound_s:5.2f} s, all {all_s:5.2f} s"
    )
    return {"stuck": num_stuck, "that": word, "sound_s": sound_s, "all_s": all_s}


def main() -> None:
    parser = argparse.ArgumentParser(description="grades per second of the reward workers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num", type=int, default=50_000, help="of plain numbers")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS)
    parser.add_argument("--json", type=Path, help="all rows")
    args = parser.parse_args()
    rows = [row for name in args.rewards for row in bench(name, args.workers, args.num)]
    rows += bench_stuck(args.workers)
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
