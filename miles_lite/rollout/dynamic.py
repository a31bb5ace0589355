"""Dynamic sampling (DAPO, section 3.2): draw groups until enough of them teach something.

Kept are the first groups, in the order their prompts were dealt, whose rewards differ. Whoever
keeps the first that *finish* prefers short answers, and never draws the same step twice. Prompts
that were asked ahead and not looked at go back to the stream, so none is lost, and where the
stream stands does not depend on timing either. Whoever minds waiting for the last answer before
new prompts are asked takes rollout.over_sampling.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from miles_lite.protocols import Metrics, PromptStream, RunError
from miles_lite.types import Group, Prompt

MAX_SPENT = 10  # prompts spent per prompt wanted, then giving up
MIN_STD = 1e-8  # of the rewards of a group that teaches something


class NothingToKeep(RunError):
    """Too many prompts in a row gave groups of equal rewards."""


@dataclass(frozen=True, slots=True)
class Filled:
    """`kept` as asked for, what was dropped on the way and why, how many prompts were put back."""

    kept: tuple[Group, ...]
    dropped: tuple[Group, ...]
    reasons: Counter[str]
    num_put_back: int

    def metrics(self) -> Metrics:
        """rollout/prompts_per_kept is the cost: prompts drawn in full per prompt trained on."""
        return {
            "rollout/prompts_per_kept": 1 + len(self.dropped) / len(self.kept),
            "rollout/prompts_put_back": float(self.num_put_back),
            **{f"rollout/dynamic_filter/drop_{why}": float(n) for why, n in self.reasons.items()},
        }


def drop_reason(group: Group, *, invalid_is_wrong: bool = False) -> str:
    """Why a group teaches nothing, "" if it does: rewards all equal, or hardly any.

    invalid_is_wrong: an answer without a verdict has reward 0, else it has none.
    """
    verdicts = [sample.verdict for sample in group.samples]
    rewards = [verdict.reward for verdict in verdicts if verdict.valid or invalid_is_wrong]
    if len(rewards) < 2:
        return "invalid"
    return "" if statistics.pstdev(rewards) > MIN_STD else f"zero_std_{rewards[0]:.1f}"


async def fill(
    stream: PromptStream,
    draw: Callable[[Prompt], Awaitable[Group]],
    *,
    wanted: int,
    at_once: int,
    filtered: bool,
    invalid_is_wrong: bool = False,
) -> Filled:
    """Draw groups of prompts of `stream` until `wanted` are kept; all of them unless `filtered`.

    at_once: prompts asked for at the start, and again when all of them are done and do not suffice.
    Asking earlier would mix new answers with those under way as timing has it, and rounding makes
    log-probs depend on what is computed together: no step could be repeated to the bit.
    Cancels what is not needed any more. Raises NothingToKeep after MAX_SPENT x wanted prompts.
    """
    tasks: list[asyncio.Future[Group]] = []
    kept: list[Group] = []
    dropped: list[Group] = []
    reasons: Counter[str] = Counter()

    def reason(task: asyncio.Future[Group]) -> str:
        if not (filtered and task.done()):
            return ""
        return drop_reason(task.result(), invalid_is_wrong=invalid_is_wrong)

    try:
        while len(kept) < wanted:
            ahead = tasks[len(kept) + len(dropped) :]
            running = [task for task in ahead if not task.done()]
            missing = wanted - len(kept)
            hopeful = sum(not reason(task) for task in ahead)
            if ahead and ahead[0].done():
                why = reason(ahead[0])
                (dropped if why else kept).append(ahead[0].result())
                reasons += Counter([why] if why else [])
            elif hopeful < missing and not running:
                _give_up(kept, dropped, reasons, wanted)
                more = stream.take(max(missing, at_once) - hopeful)
                tasks += [asyncio.ensure_future(draw(prompt)) for prompt in more]
            else:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a failure ends the step now, not when its turn has come
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    surplus = len(tasks) - len(kept) - len(dropped)
    stream.put_back(surplus)
    return Filled(tuple(kept), tuple(dropped), reasons, surplus)


def _give_up(kept: list[Group], dropped: list[Group], reasons: Counter[str], wanted: int) -> None:
    if len(dropped) < MAX_SPENT * wanted:
        return
    told = ", ".join(f"{n} x {why}" for why, n in reasons.most_common())
    mean = statistics.fmean(
        [s.verdict.reward for g in dropped for s in g.samples if s.verdict.valid] or [math.nan]
    )
    raise NothingToKeep(
        f"dynamic sampling kept {len(kept)} of {wanted} groups from {len(kept) + len(dropped)} "
        f"prompts ({told}; mean reward {mean:.3f}): the task is too easy, too hard, or its "
        "reward does not fire. Change the data, draw more samples a prompt, or set "
        "rollout.dynamic_sampling=false"
    )
