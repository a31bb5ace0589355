"""Each alarm is up when its trouble is planted and at no other time; it says cause and way out."""

from __future__ import annotations

import logging
import math
import re
from typing import get_args

import pytest

from miles_lite.alarm_config import AlarmConfig, AlarmName
from miles_lite.alarms import AGAIN, RULES, WINDOW, Alarm, Alarms, Limits, timeline
from miles_lite.bounds import ConfigError
from miles_lite.compose import compose
from miles_lite.metrics import ABS_DIFF
from miles_lite.protocols import Metrics

LIMITS = Limits(marks={"own": "\\boxed", "service": "####"})

SOUND: Metrics = {
    "rollout/raw_reward": 0.5,
    "rollout/taught_ratio": 0.8,
    "rollout/not_counted_ratio": 0.0,
    "rollout/truncated_ratio": 0.1,
    "rollout/zero_std/all_zero_percentage": 0.1,
    "rollout/zero_std/all_one_percentage": 0.1,
    "rollout/marker/boxed": 0.9,
    "rollout/marker/answer": 0.0,
    "rollout/wanted_marks/own": 0.9,
    "rollout/wanted_marks/service": 0.9,
    "reward/invalid_ratio": 0.0,
    ABS_DIFF: 0.004,
    "train/nonfinite_logprobs": 0.0,
    "train/loss": 0.02,
    "train/pg_loss": 0.02,
    "train/grad_norm": 0.7,
    "train/token_entropy": 0.4,
    "train/first_log_ratio": 2e-6,
    "memory/train/trainer_resident_bytes": 2e9,
    "perf/train_time": 100.0,
    "plan/perf/train_time": 1.2,
}

TROUBLE: dict[AlarmName, tuple[Metrics, str]] = {
    "no_signal": (
        {"rollout/taught_ratio": 0.0, "rollout/not_counted_ratio": 0.1},
        "mean reward 0.5, 10% cut .* 0% with answer, 90% with boxed",
    ),
    "zero_std": ({"rollout/taught_ratio": 0.15}, r"85% .* \(10% of the groups all 0"),
    "marker_missing": (
        {"rollout/wanted_marks/service": 0.02},
        r"^2% .* the reward service looks for \(####\)$",
    ),
    "truncated": ({"rollout/truncated_ratio": 0.6}, "60% .* cut"),
    "invalid": (
        {"reward/invalid_ratio": 0.2, "reward/invalid/timeout": 0.2},
        r"20% .* \(timeout 20.0%\)",
    ),
    "drift": ({ABS_DIFF: 0.06}, "0.06 nats a token .* alarms.drift = 0.05"),
    "drift_trend": ({ABS_DIFF: 0.02}, "from 0.004 to 0.02"),
    "not_finite": (
        {"train/loss": math.nan, "train/nonfinite_logprobs": 3.0},
        "train/loss nan, 3 log-probs",
    ),
    "entropy": ({"train/token_entropy": 0.03}, "from 0.4 to 0.03"),
    "first_ratio": ({"train/first_log_ratio": 0.02}, "by 0.02"),
    "loss_zero": ({"train/pg_loss": 3e-9}, "pg_loss is 0, as expected"),
    "memory": (
        {"memory/train/trainer_resident_bytes": 2.5e9},
        "train/trainer_resident_bytes from 2,000,000,000 to 2,500,000,000",
    ),
    "slow": ({"plan/perf/train_time": 7.0}, "perf/train_time 100.0 s is 7.0 times"),
}


def steps(*metrics: Metrics) -> dict[int, Metrics]:
    return dict(enumerate(metrics))


def told(history: dict[int, Metrics]) -> list[Alarm]:
    alarms = Alarms(LIMITS, {})
    return [alarm for step, metrics in history.items() for alarm in alarms.told(step, metrics)]


def test_every_alarm_has_a_rule_a_name_and_a_test() -> None:
    assert set(RULES) == set(get_args(AlarmName)) == set(TROUBLE)


def test_a_sound_run_is_quiet() -> None:
    assert timeline(steps(*[SOUND] * 60), LIMITS) == []


@pytest.mark.parametrize("name", TROUBLE)
def test_planted_trouble_is_told_with_cause_and_remedy(name: AlarmName) -> None:
    change, words = TROUBLE[name]
    history = steps(*[SOUND] * 2 * WINDOW, *[SOUND | change] * WINDOW)
    first, *others = told(history)
    assert (first.name, first.severity) == (name, RULES[name].severity)
    assert 2 * WINDOW <= first.step < 3 * WINDOW
    assert re.search(words, first.message), first.message
    assert first.remedy
    assert not others  # told once while it lasts, and nothing else is


def test_a_lasting_alarm_is_told_again_and_a_new_one_at_once() -> None:
    cut = SOUND | TROUBLE["truncated"][0]
    history = steps(*[cut] * (AGAIN + 2), SOUND, cut)
    assert [alarm.step for alarm in told(history)] == [0, AGAIN, AGAIN + 3]
    up = [alarm.step for alarm in timeline(history, LIMITS)]
    assert up == [*range(AGAIN + 2), AGAIN + 3]


def test_a_note_is_made_once() -> None:
    noted = timeline(steps(*[SOUND | TROUBLE["loss_zero"][0], SOUND] * AGAIN), LIMITS)
    assert [alarm.name for alarm in noted] == ["loss_zero"]


def test_values_that_are_missing_raise_no_alarm() -> None:
    assert timeline(steps(*[{"train/loss": 0.1}] * 3 * WINDOW), LIMITS) == []


def test_an_evaluation_is_no_step() -> None:
    assert timeline({0: SOUND, 1: {"eval/eval": 0.5}}, LIMITS) == []


def test_a_resumed_run_says_what_the_undisturbed_one_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    history = [SOUND] * 7 + [SOUND | TROUBLE["drift_trend"][0]] * 9
    for cut in range(len(history)):
        caplog.clear()
        before = dict(list(enumerate(history))[:cut])
        alarms = Alarms(LIMITS, before)
        values = [alarms.look(step, metrics) for step, metrics in list(enumerate(history))[cut:]]
        wanted = [str(alarm) for alarm in told(steps(*history)) if alarm.step >= cut]
        assert [record.getMessage() for record in caplog.records] == wanted
        assert values[-1] == {"alarms/drift_trend": 1.0}
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}


def test_only_chosen_alarms_are_fatal() -> None:
    cut = SOUND | TROUBLE["truncated"][0]
    for stop in ((), ("drift",), ("truncated",)):
        alarms = Alarms(Limits(AlarmConfig(stop=stop)), {0: cut})
        assert alarms.fatal is None  # somebody started it again
        alarms.look(1, cut)
        assert (alarms.fatal is not None) == (stop == ("truncated",))


def test_thresholds_come_from_the_configuration() -> None:
    cfg = compose(["experiment=tiny", "alarms.truncated=0.05", "alarms.stop=[drift]"])
    limits = Limits.of(cfg)
    assert limits.config.stop == ("drift",)
    assert [alarm.name for alarm in timeline(steps(SOUND), limits)] == ["truncated", "drift"]
    with pytest.raises(ConfigError, match=r"alarms\.stop = 'drfit' is not one of .*drift"):
        compose(["experiment=tiny", "alarms.stop=[drfit]"])
    with pytest.raises(ConfigError, match=r"alarms\.stop = 'drift' is not a list"):
        compose(["experiment=tiny", "alarms.stop=drift"])
    with pytest.raises(ConfigError, match="drift = 0.0: wanted more than 0"):
        compose(["experiment=tiny", "alarms.drift=0"])
