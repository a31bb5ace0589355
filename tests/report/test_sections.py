"""Tables and series of a report, against figures worked out by hand from the planted metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_lite.report import drift, sections, waste
from miles_lite.report.names import percent, seconds, size, words
from miles_lite.report.runs import read_runs
from tests.report.planted import looked_at, metrics, plant


def rows(table: sections.Table) -> dict[str, list[str]]:
    """Cells as text, by the first one of their row."""
    told = [[c if isinstance(c, str) else str(c["text"]) for c in row] for row in table.rows]
    return {row[0]: row[1:] for row in told}


def test_the_parts_of_a_step_add_up_to_its_time() -> None:
    parts = sections.step_parts(metrics(0))
    assert parts["updates"] == 3.5 and parts["hand over the batch"] == pytest.approx(0.5)
    assert parts["evaluation and all else"] == pytest.approx(10 - 4 - 5 - 0.5 - 0.3)
    assert sum(parts.values()) == pytest.approx(10)


def test_the_ledger_counts_what_taught_nothing(small: Path) -> None:
    found = rows(waste.ledger(read_runs([small])))
    told = {
        what.split(":")[0] if "Idle" not in what else what: row[0] for what, row in found.items()
    }
    # 25 % of 4 + 5 s a step, of 10 s, in 6 steps
    assert told["Groups of zero advantage"] == "13.5 s, 22 % of the time; 25 % of the answers"
    # 10 % of the answers, twice as long as the mean: 20 % of the tokens
    assert told["Truncated"] == "10.8 s, 18 % of the time; 10 % of the answers"
    assert told["Over-sampled"] == "12 s, 20 % of the time; 50 % of the answers"
    assert told["Idle: trainer ranks wait for the busiest"].startswith("6 s, 10 %")
    assert told["Idle: engine slots wait for the longest answer (at most)"].startswith("12 s, 20 %")
    assert told["Aborted"].startswith("18 prompts")


def test_percent_of_the_limit_is_floor_over_measured(small: Path) -> None:
    (run,) = read_runs([small])
    floor = run.phases["score"].floor_s + run.phases["train"].floor_s
    told = rows(sections.limits([run]))["score + train"][0]
    assert floor > 0
    assert told == f"{percent(floor / 5)} ({seconds(floor)} of 5 s)"


def test_a_run_that_cannot_be_planned_says_why(tmp_path: Path, small: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((small / "metrics.jsonl").read_bytes())
    (tmp_path / "config.yaml").write_text("experiment: x\nno_such_key: 1\n")
    (run,) = read_runs([tmp_path])
    table = sections.limits([run])
    assert "no_such_key" in table.note and rows(table)["generate"] == ["–"]


def test_plan_against_measured(small: Path) -> None:
    found = rows(sections.planned(read_runs([small])))
    assert found["Seconds a step"] == ["2.00 × (10 s of 5 s)"]
    assert found["Bytes in phase train: trainer weights"] == ["1.00 × (2 GB of 2 GB)"]


def test_memory_is_the_most_after_entering_a_phase(small: Path) -> None:
    (run,) = read_runs([small])
    stack = sections.memory(run)
    assert stack.labels == ["generate", "train"]
    assert stack.parts["engine cache"] == [4e9 + 5, 0.0]
    assert stack.parts["trainer weights"] == [0.0, 2e9] and len(stack.parts) == 3
    *_, held, device, resident = sections.memory_table([run]).rows
    assert held == ["train", "all", "8 GB"]  # what the device holds in all is no part of it
    assert device == ["train", "trainer: everything on the devices", "8.5 GB"]
    assert resident == ["train", "trainer: host memory of the largest process", "3 GB"]


def test_alarms_are_told_once_each_and_critical_ones_first(small: Path) -> None:
    first, second = sections.alarms(read_runs([small]))
    assert (first["name"], first["when"]) == ("first_ratio", "step 4")
    assert (second["name"], second["when"]) == ("drift", "2 of the steps 0 to 2")


def test_an_alarm_that_lasts_is_told_with_its_last_step(tmp_path: Path) -> None:
    drifts = looked_at(train__train_rollout_logprob_abs_diff=0.06)
    run = plant(tmp_path, "lasting", 8, troubles=dict.fromkeys(range(1, 7), drifts))
    first, second = sections.alarms(read_runs([run]))
    assert (first["name"], first["when"]) == ("not_finite", "step 3")
    assert (second["name"], second["when"]) == ("drift", "steps 1 to 6")


@pytest.mark.parametrize("config", ["", "experiment: x\nno_such_key: 1\n"])
def test_without_its_limits_a_run_is_judged_by_the_default_ones(
    tmp_path: Path, small: Path, config: str
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((small / "metrics.jsonl").read_bytes())
    if config:
        (tmp_path / "config.yaml").write_text(config)
    *told, limits = sections.alarms(read_runs([tmp_path]))
    assert [entry["name"] for entry in told] == ["first_ratio", "drift"]
    assert (limits["name"], limits["severity"]) == ("limits", "note")
    assert ("no_such_key" if config else "config.yaml") in limits["message"]


def test_drift_is_told_in_parts_and_with_what_was_found(small: Path, other: Path) -> None:
    runs = read_runs([small, other])
    found = rows(drift.parts(runs))
    assert found["Engine token by token against engine at once, nats a token"] == ["2e-07"] * 2
    assert len(found) == 2  # and the headline: nothing else was measured
    told = drift.causes(runs).rows
    assert told[0] == [
        "small", "step 4", "sampling truncation", "0.35", "log-probs of the kept tokens"
    ]  # fmt: skip
    assert told[1][2:] == ["decode against trainer", "0.4", "nats a token"]
    assert told[2][2:] == ["layer 1 (E)", "1e-06", "at most 2e-06, 25.00% of routes flip"]
    assert "miles-lite drift" in drift.causes(runs[1:]).note


@pytest.mark.slow
def test_series_keep_what_is_not_finite_and_every_evaluation(small: Path, large: Path) -> None:
    (run,) = read_runs([small])
    assert sections.series(run)["train/grad_norm"][3] == "nan"
    (long,) = read_runs([large])
    columns = sections.series(long, stride=64)
    steps = columns["step"]
    assert len(steps) == len(columns["rollout/raw_reward"]) < 50
    assert {0, 50, 64, 950, 999} <= set(steps)
    assert sum(value is not None for value in columns["eval/held"]) == 20


def test_what_differs_between_runs(small: Path, other: Path) -> None:
    found = rows(sections.differences(read_runs([small, other])))
    assert found["optim.lr"] == ["0.0004", "0.125"]
    assert "seed" not in found
    everything = rows(sections.configuration(read_runs([small])))
    assert everything["seed"] == ["0"]
    assert "environment.python" in everything and not any("hostname" in key for key in everything)


def test_runs_of_one_name_are_told_apart_and_outcomes_read(small: Path, other: Path) -> None:
    runs = read_runs([small, small, other])
    assert [run.name for run in runs] == ["small", "small (2)", "other"]
    assert [run.outcome for run in runs] == ["finished", "finished", "still running, or killed"]
    assert max(runs[2].metrics) == 3  # not the half-written one


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        read_runs([tmp_path])


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    runs = read_runs([tmp_path])
    assert rows(sections.overview(runs))["Steps trained"] == ["0"]
    for table in (sections.step_time_table, sections.memory_table, sections.planned, waste.ledger):
        table(runs)
    assert sections.step_time(runs[0]).labels == []


def test_numbers_in_words() -> None:
    told = [seconds(value) for value in (0.0123, 0.1, 12.345, 2250, 9000, None)]
    assert told == ["12.3 ms", "0.1 s", "12.3 s", "37.5 min", "2.5 h", "–"]
    assert [size(v) for v in (5, 2.5e6, 141e9)] == ["5 B", "2.5 MB", "141 GB"]
    assert [percent(v) for v in (0.00123, 0.25, None)] == ["0.12 %", "25 %", "–"]
    assert words("plan/perf/step_time") == "Measured over planned: Seconds a step"
    assert words("eval/aime-2024") == "Held-out reward: aime-2024"
    for end in ("truncated_ratio", "mean@8", "pass@1-low"):
        assert words(f"eval/aime-2024-{end}") == f"eval/aime-2024-{end}"
    assert words("made/up") == "made/up"
