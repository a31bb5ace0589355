"""What a person would want to be told of a run's numbers, with its cause and the way out.

Alarms are a function of the metrics of a run and of nothing else: the loop, W&B and the report,
which reads them long after, all say the same.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from miles_lite.alarm_config import AlarmConfig, AlarmName
from miles_lite.algo.drift_parts import suspect
from miles_lite.algo.marks import wanted_marks
from miles_lite.config import Config
from miles_lite.metrics import ABS_DIFF
from miles_lite.protocols import Metrics

logger = logging.getLogger(__name__)

LEVELS = {"note": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}

WINDOW = 5  # steps at the beginning of a run, and as many latest ones to hold against them
AGAIN = 25  # steps until an alarm that lasts is told again
FEW_MARKS = 0.1  # share of answers with the mark that the reward looks for
FIRST_LOG_RATIO = 0.01  # nats a token: no rounding of the same computation, also in bf16
DRIFT_GROWTH = 3.0  # latest steps against the first ones
PLAN_FACTOR = 5.0  # time of a phase against the plan's
MEMORY_GROWTH = 1.1  # latest steps against the first ones, and
SMALL_BYTES = 64 << 20  # no growth of memory that is less
SMALL_DRIFT = 1e-4  # nats a token; no trend below
SMALL_S = 1.0  # a phase shorter than that is in time


@dataclass(frozen=True, slots=True)
class Alarm:
    step: int
    name: str
    severity: Literal["note", "warning", "critical"]
    message: str  # what is the matter, with values, and the likely cause
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.message}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the alarms of a run depend on besides its metrics."""

    config: AlarmConfig = field(default_factory=AlarmConfig)
    # that its rewards look for: of rollout/wanted_marks/*
    marks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Config) -> Limits:
        wanted = wanted_marks(cfg.reward)
        words = {k or "own": ", ".join(m.name for m in marks) for k, marks in wanted.items()}
        return cls(cfg.alarms, words)


class Seen:
    """The first and the latest steps of a run."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.first: list[Metrics] = []
        self.latest: deque[Metrics] = deque(maxlen=WINDOW)

    def add(self, metrics: Metrics) -> None:
        self.num_steps += 1
        if len(self.first) < WINDOW:
            self.first.append(metrics)
        self.latest.append(metrics)

    def __call__(self, name: str) -> float:
        """The value of this step; NaN if it has none."""
        return self.latest[-1].get(name, math.nan)

    def then_and_now(self, name: str) -> tuple[float, float]:
        """Medians over the first and the latest WINDOW steps; NaN before these are other steps."""
        then, now = (
            [step[name] for step in steps if name in step] for steps in (self.first, self.latest)
        )
        if self.num_steps < 2 * WINDOW or not then or not now:
            return math.nan, math.nan
        return statistics.median(then), statistics.median(now)


Rule = Callable[[Seen, "Limits"], str]  # what is the matter, or ""


def _dead(seen: Seen, limits: Limits) -> str:
    if seen("rollout/taught_ratio") != 0:
        return ""
    marks = [name for name in seen.latest[-1] if name.startswith("rollout/marker/")]
    shares = ", ".join(f"{seen(name):.0%} with {name.rpartition('/')[2]}" for name in sorted(marks))
    return (
        "no reward tells an answer to be better than another: mean reward "
        f"{seen('rollout/raw_reward'):.3g}, "
        f"{seen('rollout/truncated_ratio'):.0%} cut at the length limit, "
        f"{seen('reward/invalid_ratio'):.0%} without verdict, {shares}"
    )


def _zero_std(seen: Seen, limits: Limits) -> str:
    share = 1 - seen("rollout/taught_ratio") - seen("rollout/not_counted_ratio")
    if not share > limits.config.zero_advantage or _dead(seen, limits):  # which says enough
        return ""
    hard = seen("rollout/zero_std/all_zero_percentage")
    easy = seen("rollout/zero_std/all_one_percentage")
    return (
        f"{share:.0%} of the answers teach nothing, as their reward is that of all their group "
        f"({hard:.0%} of the groups all 0, {easy:.0%} all 1)"
    )


def _marker(seen: Seen, limits: Limits) -> str:
    told = [
        f"{seen(name):.0%} of the answers have what the reward{of} looks for ({mark})"
        for reward, mark in limits.marks.items()
        if seen(name := f"rollout/wanted_marks/{reward}") < FEW_MARKS
        for of in ("" if reward == "own" else f" {reward}",)
    ]
    return "; ".join(told)


def _truncated(seen: Seen, limits: Limits) -> str:
    share = seen("rollout/truncated_ratio")
    if not share > limits.config.truncated:
        return ""
    return f"{share:.0%} of the answers are cut at the length limit, and so count as wrong"


def _invalid(seen: Seen, limits: Limits) -> str:
    share = seen("reward/invalid_ratio")
    if not share > limits.config.invalid:
        return ""
    prefix = "reward/invalid/"
    reasons = {
        name.removeprefix(prefix): value
        for name, value in seen.latest[-1].items()
        if prefix in name
    }
    told = ", ".join(f"{name} {value:.1%}" for name, value in sorted(reasons.items()))
    return f"{share:.0%} of the answers have no verdict ({told})"


def _drift(seen: Seen, limits: Limits) -> str:
    now = seen(ABS_DIFF)
    if not now > limits.config.drift:
        return ""
    where = suspect(seen.latest[-1])
    return (
        f"engine and trainer disagree by {now:.3g} nats a token about the same weights, more than "
        f"alarms.drift = {limits.config.drift:g}{where and f': {where}'}"
    )


def _drift_trend(seen: Seen, limits: Limits) -> str:
    then, now = seen.then_and_now(ABS_DIFF)
    grown = now > max(SMALL_DRIFT, DRIFT_GROWTH * then)
    if not grown or _drift(seen, limits):  # which says enough
        return ""
    return f"the drift has grown from {then:.3g} to {now:.3g} nats a token"


def _not_finite(seen: Seen, limits: Limits) -> str:
    broken = seen("train/nonfinite_logprobs")
    names = ("train/loss", "train/grad_norm")
    bad = [
        f"{name} {seen(name)}"
        for name in names
        if name in seen.latest[-1] and not math.isfinite(seen(name))
    ]
    if broken > 0:
        bad.append(f"{broken:.0f} log-probs not finite")
    return ", ".join(bad)


def _entropy(seen: Seen, limits: Limits) -> str:
    then, now = seen.then_and_now("train/token_entropy")
    if not now < limits.config.entropy_share * then:
        return ""
    return f"the entropy of the policy has fallen from {then:.3g} to {now:.3g} nats a token"


def _first_ratio(seen: Seen, limits: Limits) -> str:
    gap = seen("train/first_log_ratio")
    if not gap > FIRST_LOG_RATIO:
        return ""
    return (
        "before the first update of a step the policy already differs from its own old log-probs, "
        f"by {gap:.3g} nats a token: training and scoring do not compute the same"
    )


def _loss_zero(seen: Seen, limits: Limits) -> str:
    if not (abs(seen("train/pg_loss")) < 1e-6 and seen("train/grad_norm") > 0):
        return ""
    return (
        "train/pg_loss is 0, as expected here: with one update a step all ratios are 1 and "
        "advantages have mean 0; the gradient is not 0, see train/grad_norm"
    )


def _memory(seen: Seen, limits: Limits) -> str:
    """Not against the very first step, in which allocators settle."""
    told = []
    for name in seen.latest[-1]:
        if name.startswith("memory/"):
            then, now = seen.then_and_now(name)
            if now > MEMORY_GROWTH * then + SMALL_BYTES:
                told.append(f"{name.removeprefix('memory/')} from {then:,.0f} to {now:,.0f}")
    return "memory that is not given back: " + ", ".join(told) if told else ""


def _slow(seen: Seen, limits: Limits) -> str:
    told = []
    for name in seen.latest[-1]:
        measured = name.removeprefix("plan/")
        if name.startswith("plan/perf/") and len(seen.latest) == WINDOW:
            factor = statistics.median(step.get(name, math.nan) for step in seen.latest)
            took = statistics.median(step.get(measured, math.nan) for step in seen.latest)
            if factor > PLAN_FACTOR and took > SMALL_S:
                told.append(f"{measured} {took:.1f} s is {factor:.1f} times the plan's")
    return ", ".join(told)


@dataclass(frozen=True, slots=True)
class _Entry:
    severity: Literal["note", "warning", "critical"]
    rule: Rule
    remedy: str


RULES: Mapping[AlarmName, _Entry] = {
    "no_signal": _Entry(
        "critical",
        _dead,
        "Run `miles-lite reward-audit`: it tells whether a right answer can score",
    ),
    "zero_std": _Entry(
        "warning",
        _zero_std,
        "Choose harder or easier prompts, draw more samples a prompt, or sample dynamically "
        "(algo=dapo)",
    ),
    "marker_missing": _Entry(
        "warning",
        _marker,
        "Ask for the mark in the prompt, allow longer answers, or choose a reward that reads what "
        "the model writes: `miles-lite reward-audit`",
    ),
    "truncated": _Entry(
        "warning", _truncated, "Raise rollout.max_response_tokens, or shape the length"
    ),
    "invalid": _Entry("warning", _invalid, "See docs/rewards.md for the reasons"),
    "drift": _Entry("warning", _drift, "`miles-lite drift` tells where it comes from"),
    "drift_trend": _Entry("warning", _drift_trend, "`miles-lite drift` tells where it comes from"),
    "not_finite": _Entry(
        "critical", _not_finite, "Lower optim.lr or optim.clip_grad; look at this step's samples"
    ),
    "entropy": _Entry(
        "warning", _entropy, "Lower optim.lr, raise algo.eps_clip_high, or add algo.entropy_coef"
    ),
    "first_ratio": _Entry("critical", _first_ratio, "That is a bug, or dropout: please report it"),
    "loss_zero": _Entry("note", _loss_zero, "Nothing is to be done"),
    "memory": _Entry("warning", _memory, "A run ends from this days later: please report it"),
    "slow": _Entry(
        "warning", _slow, "Look for other work on the hosts, or correct configs/hardware"
    ),
}


class Alarms:
    """Watches the steps of a run, in order. `fatal` is the alarm that ends it, if any."""

    def __init__(self, limits: Limits, before: Mapping[int, Metrics]) -> None:
        """before: what an earlier attempt logged of the steps that are done."""
        self._limits = limits
        self._seen = Seen()
        self._last_told: dict[str, int] = {}  # step at which each was told last, while it lasts
        self._noted: set[str] = set()
        self.fatal: Alarm | None = None
        for step, metrics in before.items():
            self.told(step, metrics)
        self.fatal = None  # somebody went on regardless

    def look(self, step: int, metrics: Metrics) -> Metrics:
        """Log what is to be told of this step. Returns alarms/{name} = 1 of all that are up."""
        for alarm in self.told(step, metrics):
            logger.log(LEVELS[alarm.severity], "%s", alarm)
        return {f"alarms/{name}": 1.0 for name in self._last_told}

    def told(self, step: int, metrics: Metrics) -> list[Alarm]:
        """Those to be told at this step, which is the next one."""
        new, last_told = [], {}
        for alarm in self.up(step, metrics):
            last_told[alarm.name] = self._last_told.get(alarm.name, step - AGAIN)
            if step >= last_told[alarm.name] + AGAIN:
                new.append(alarm)
                last_told[alarm.name] = step
            if alarm.name in self._limits.config.stop:
                self.fatal = alarm
            if alarm.severity == "note":
                del last_told[alarm.name]
        self._last_told = last_told
        return new

    def up(self, step: int, metrics: Metrics) -> list[Alarm]:
        """All that are up at this step, which is the next one; a note is made once."""
        if "train/loss" not in metrics:
            return []
        self._seen.add(metrics)
        found = [
            Alarm(step, name, entry.severity, text, entry.remedy)
            for name, entry in RULES.items()
            if name not in self._noted and (text := entry.rule(self._seen, self._limits))
        ]
        self._noted |= {alarm.name for alarm in found if alarm.severity == "note"}
        return found


def timeline(steps: Mapping[int, Metrics], limits: Limits) -> list[Alarm]:
    """All alarms of a run, at each step that they were up."""
    alarms = Alarms(limits, {})
    return [alarm for step, metrics in steps.items() for alarm in alarms.up(step, metrics)]
