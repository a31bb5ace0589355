"""Thresholds of the alarms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from miles_lite.bounds import ConfigError

AlarmName = Literal[
    "no_signal",
    "zero_std",
    "marker_missing",
    "truncated",
    "invalid",
    "drift",
    "drift_trend",
    "not_finite",
    "entropy",
    "first_ratio",
    "loss_zero",
    "memory",
    "slow",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmConfig:
    """When a step's metrics are worth a warning, see alarms.py."""

    stop: tuple[AlarmName, ...] = ()  # these end the run, once all is saved
    zero_advantage: float = 0.8  # share of answers above which zero_std is told
    truncated: float = 0.3  # share of answers
    invalid: float = 0.05  # share of answers
    drift: float = 0.05  # nats a token; bf16 engines and trainers are at 0.002 to 0.02
    entropy_share: float = 0.1  # of the entropy of the first steps

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.name != "stop" and not value > 0:
                raise ConfigError(f"{limit.name} = {value}: wanted more than 0; .inf turns it off")
