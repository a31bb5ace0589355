"""`miles-lite train --supervise`: a run whose driver is started again after an accident.

    supervisor -> guard (launch/guard.py) -> driver (miles-lite train) -> Ray and all else

The guard leaves nothing of an attempt before the next one goes on from the last checkpoint. No
accident is what ends a run for a reason that stays: a mistake of the user, an alarm that is to end
it, being asked to stop. Every restart is a line of restarts.jsonl in the run folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from miles_lite.compose import compose
from miles_lite.intact import writing
from miles_lite.launch.child import Child
from miles_lite.metrics import drop_cut_line
from miles_lite.protocols import RunError
from miles_lite.run import read_metrics
from miles_lite.stop import ENDED_ITSELF, SIGNALS, Stopped
from miles_lite.summary import RESTARTS

logger = logging.getLogger(__name__)

DEFAULT_RESTARTS = 10  # without a step further than all before
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
# attempts in a row with the same error at the same step: a bug, not an accident; but not if a
# process died: who kills at random may strike often before there is progress
SAME_ERRORS = 3
MAX_CAUSE = 300  # characters: some libraries write pages

REASONS = {0: "it has finished", 2: "a mistake that no restart mends"}
REASONS |= {ENDED_ITSELF: "the run ended itself"}
REASONS |= {128 + signum: f"it was asked to stop by {signum.name}" for signum in SIGNALS}
_DEATH = re.compile(r"\bdied\b|killed by|signal")
_VARYING = re.compile(r"\b(?:[0-9a-f]{8,}|\w*\d\w*)\b")  # process ids, addresses, names of objects


@dataclass(frozen=True, slots=True)
class Ending:
    """Of an attempt."""

    code: int  # exit status of the driver, 128 + N if signal N ended it
    step: int  # steps trained by then
    cause: str

    def resembles(self, other: Ending) -> bool:
        ours, theirs = (_VARYING.sub("#", end.cause) for end in (self, other))
        return (self.code, self.step, ours) == (other.code, other.step, theirs)


@dataclass(frozen=True, slots=True)
class Decision:
    again: bool
    why: str
    wait_s: float = 0.0


def decide(endings: Sequence[Ending], restarts: int) -> Decision:
    """What follows the last of `endings`, all of one run; `restarts`: at most so many in a row of
    which none trained further than all before. The wait doubles with each of those."""
    last = endings[-1]
    if last.code in REASONS:
        return Decision(False, REASONS[last.code])
    furthest = max(end.step for end in endings)
    stuck = len(endings) - [end.step for end in endings].index(furthest)
    if stuck > restarts:
        return Decision(
            False, f"it was started again {restarts} times without a step beyond {furthest}"
        )
    alike = len([*takewhile(last.resembles, reversed(endings))])
    if alike >= SAME_ERRORS and not _DEATH.search(last.cause):
        return Decision(
            False, f"{alike} times in a row it ended after {last.step} steps in the same way"
        )
    return Decision(True, last.cause, min(FIRST_WAIT_S * 2 ** (stuck - 1), MAX_WAIT_S))


class Foreground:
    """The one child that signals to this process are for; made in an event loop, which it lets
    hear them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._child: Child | None = None
        self.signals: list[int] = []  # that came, the first one first
        task = asyncio.current_task()
        assert task is not None
        for signum in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, self._heed, signum, task)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return bool(self.signals)

    async def run(self, command: str, words: Sequence[str]) -> int:
        """The exit status of `miles-lite COMMAND WORDS`, of which nothing is left."""
        argv = [sys.executable, "-m", "miles_lite.cli", command, *words]
        self._child = await Child.start(command, argv, self._env)
        try:
            code = await self._child.wait()
            return code if code >= 0 else 128 - code  # the guard itself was killed
        finally:
            await self._child.stop()
            self._child = None

    async def stop(self, grace_s: float) -> None:
        if self._child is not None:
            await self._child.stop(grace_s)

    def _heed(self, signum: int, task: asyncio.Task[int]) -> None:
        """The driver ends the step first, at a second signal at once, at a third it is killed."""
        self.signals.append(signum)
        if self._child is not None and self._child.name == "train":
            self._child.signal(signum) if len(self.signals) < 3 else self._child.kill()
        elif len(self.signals) == 1:
            task.cancel()


async def supervise(
    folder: Path, attempt: Callable[[], Awaitable[int]], restarts: int, stopping: Callable[[], bool]
) -> int:
    """The status of the last attempt at the run in `folder`. stopping: no more are wanted."""
    endings: list[Ending] = []
    while True:
        before = _stamp(folder)
        code = await attempt()
        endings.append(_ending(folder, code, before))
        decision = decide(endings, restarts)
        if stopping():
            return code
        if not decision.again:
            if code not in REASONS:
                logger.warning("not started again: %s", decision.why)
            return code
        _tell(folder, endings, decision)
        await asyncio.sleep(decision.wait_s)
        if stopping():
            return code


def _stamp(folder: Path) -> int:
    summary = folder / "summary.json"
    return summary.stat().st_mtime_ns if summary.is_file() else 0


def _ending(folder: Path, code: int, before: int) -> Ending:
    """before: when summary.json was written before the attempt."""
    cause = f"the driver ended with status {code}"
    if code - 128 in {*signal.Signals}:  # 255 is a status like another
        cause = f"the driver was killed by {signal.Signals(code - 128).name}"
    if _stamp(folder) != before and _stamp(folder):  # a driver that is killed writes none
        said = json.loads((folder / "summary.json").read_text()).get("error", cause)
        cause = " ".join(said.split())[:MAX_CAUSE]
    logged = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else {}
    trained = [step for step, metrics in logged.items() if "perf/step_time" in metrics]
    return Ending(code, max(trained, default=-1) + 1, cause)


def _tell(folder: Path, endings: Sequence[Ending], decision: Decision) -> None:
    last = endings[-1]
    logger.warning(
        "restart %d, in %g s: after %d steps %s",
        *(len(endings), decision.wait_s, last.step, decision.why),
    )
    told = {"time": time.time(), "step": last.step, "code": last.code, "cause": last.cause}
    path = folder / RESTARTS
    try:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            drop_cut_line(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
    except RunError as error:  # the run itself decides whether it can go on
        logger.error("%s", error)


# ------------------------------------------------------------------ the command


def options(words: Sequence[str]) -> argparse.Namespace:
    """Of `miles-lite train`."""
    parser = argparse.ArgumentParser(prog="miles-lite train", description="train a run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="experiment=NAME and others"
    )
    parser.add_argument(
        "--supervise", action="store_true", help="go on from the last checkpoint after an accident"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help=f"at most so many in a row without a further step, {DEFAULT_RESTARTS}",
    )
    found = parser.parse_intermixed_args(words)
    if found.restarts is not None and not found.supervise:
        parser.error("--restarts is for --supervise")
    return found


def run(overrides: Sequence[str], restarts: int | None) -> int:
    """The status of the run. restarts: None for the default."""
    cfg = compose(overrides)
    # a name is what lets it go on
    name = cfg.log.name or f"{cfg.experiment}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    words = [*(o for o in overrides if not o.startswith("log.name=")), f"log.name={name}"]

    async def all_attempts() -> int:
        driver = Foreground(os.environ)
        try:
            return await supervise(
                cfg.log.folder / name,
                lambda: driver.run("train", words),
                DEFAULT_RESTARTS if restarts is None else restarts,
                lambda: driver.asked,
            )
        except asyncio.CancelledError:
            raise Stopped(driver.signals[0], "between two attempts") from None

    return asyncio.run(all_attempts())
