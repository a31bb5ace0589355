"""The console: a live view in a terminal, plain lines elsewhere, and errors always visible."""

from __future__ import annotations

import io
import math
import re
import time
from typing import Any

import pytest
from rich.console import Console as Terminal

from miles_lite.console import ASCII, Console, seconds, sparkline

METRICS = {
    "rollout/raw_reward": 0.5,
    "train/train_rollout_logprob_abs_diff": 0.00125,
    "rollout/response_len/mean": 1234.5,
    "perf/step_time": 3.25,
}


class Screen:
    """Something to print on, and what was printed."""

    def __init__(self, *, is_terminal: bool = False, width: int = 120) -> None:
        self.file = io.StringIO()
        self.terminal = Terminal(file=self.file, force_terminal=is_terminal, width=width)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def plain(screen: Screen, num_steps: int = 4, **options: Any) -> Console:
    return Console("test", num_steps, live=False, terminal=screen.terminal, **options)


def test_without_a_terminal_a_step_is_one_line() -> None:
    screen = Screen(width=20)  # no wrapping at any width
    with plain(screen) as console:
        for step in range(2):
            for phase in ("generate", "train", "sync"):
                console.phase(phase)
            console.step(step, METRICS)
    first, second = screen.text.splitlines()
    assert first.startswith("step 1/4: reward 0.500, drift 1.25e-03, response 1,234.5 tokens")
    assert second.startswith("step 2/4: ")
    assert second.endswith(" left")
    assert "\x1b" not in screen.text


def test_a_slow_phase_gets_one_line_while_it_lasts() -> None:
    screen = Screen()
    with plain(screen, slow_phase_s=0.05) as console:
        console.phase("generate")
        deadline = time.monotonic() + 10
        while not screen.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert re.match(r"step 1/4: generate, 0\.\d s\n", screen.text)
        console.phase("train")
    time.sleep(0.1)
    assert len(screen.text.splitlines()) == 1


def test_a_slow_phase_tells_expected_time_and_who_is_waited_for() -> None:
    screen = Screen()
    with plain(screen, slow_phase_s=0.05) as console:
        console.watch(lambda: "3/8 answers, waiting for engine 1\x1b[2J")
        for _ in range(2):
            console.phase("generate")
            time.sleep(0.2)
    lines = [line for line in screen.text.splitlines() if "generate" in line]
    assert all(r"3/8 answers, waiting for engine 1\x1b[2J" in line for line in lines)
    assert re.search(r"generate, 0\.\d s of about 0\.\d s, 3/8", lines[-1])
    assert "left" not in lines[-1]  # nobody knows before the first step is done


def test_a_slow_phase_tells_when_the_run_will_end() -> None:
    screen = Screen()
    with plain(screen, slow_phase_s=0.05) as console:
        console.phase("generate")
        console.step(0, METRICS)
        console.phase("train")
        time.sleep(0.2)
    lines = [line for line in screen.text.splitlines() if "train, " in line]
    assert lines and all(re.search(r"train, 0\.\d s, \d\.\d s left$", line) for line in lines)


def test_the_time_to_start_is_not_expected_of_each_step() -> None:
    screen = Screen()
    with plain(screen) as console:
        console.phase("start")
        time.sleep(1.2)
        console.start_at(0)
        console.phase("generate")
        console.step(0, METRICS)
    assert re.search(r"start 1\.\d s, .*0\.\d s left$", screen.text.strip())


def test_a_step_line_has_the_time_of_each_phase() -> None:
    screen = Screen()
    with plain(screen) as console:
        for phase, took in (("generate", 0.1), ("train", 0.2), ("sync", 0.0)):
            console.phase(phase)
            time.sleep(took)
        console.step(0, METRICS)
    assert re.search(r", generate 0\.\d s, train 0\.\d s, ", screen.text)
    assert "sync" not in screen.text


def test_live_view_names_the_alarms_that_are_up() -> None:
    screen = Screen(is_terminal=True)
    with Console("test", 4, live=True, terminal=screen.terminal) as console:
        console.step(0, METRICS | {"alarms/drift": 1.0, "alarms/truncated": 1.0})
    assert "alarms: drift, truncated" in screen.text


def test_missing_and_broken_metrics_are_no_error() -> None:
    screen = Screen()
    with plain(screen) as console:
        console.step(0, {})
        console.step(1, {"rollout/raw_reward": math.nan})
    assert "reward nan" in screen.text


def test_an_error_passes_and_is_placed() -> None:
    screen = Screen()
    with pytest.raises(ValueError), plain(screen) as console:
        console.step(0, METRICS)
        console.phase("train")
        raise ValueError
    assert screen.text.splitlines()[-1].startswith("step 2/4: ended in train after ")


def test_a_reader_that_went_away_stops_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(screen.terminal, "print", broken)
    with plain(screen) as console:
        console.step(0, METRICS)


def test_live_view_shows_the_state_and_gives_the_terminal_back() -> None:
    screen = Screen(is_terminal=True)
    with Console("test", 4, live=True, terminal=screen.terminal) as console:
        console.phase("generate")
        console.step(0, METRICS)
        console.step(1, {**METRICS, "rollout/raw_reward": 0.75})
        console.phase("train")
    for part in ("test", "step 3/4", "train", "left", "reward", "0.750", "drift", "1,234.5"):
        assert part in screen.text, part
    assert screen.text.rfind("\x1b[?25h") > screen.text.rfind("\x1b[?25l")  # cursor shown again


def test_live_view_puts_prints_and_errors_above(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(is_terminal=True)
    with pytest.raises(RuntimeError), Console("t", 4, live=True, terminal=screen.terminal):
        print("a word from elsewhere")
        raise RuntimeError
    print("after")
    assert "a word from elsewhere" in screen.text
    assert "ended in start" in screen.text
    assert capsys.readouterr().out == "after\n"  # stdout is its own again


@pytest.mark.parametrize("live", [True, False])
def test_untrusted_text_is_never_obeyed(live: bool) -> None:
    screen = Screen(is_terminal=live)
    with Console("x\x1b]0;title\x07", 4, live=live, terminal=screen.terminal) as console:
        console.phase("y\x1b[2J")
        console.evaluated(0, {"eval/\x1b[2J": 0.5})
    console.summary(["[red]it[/red] \x1b[2J \u202e"])
    assert "\x1b[2J" not in screen.text
    assert "\x1b]0;" not in screen.text
    assert "[red]it[/red] \\x1b[2J \\u202e" in screen.text


@pytest.mark.parametrize("live", [True, False])
def test_calls_are_cheap(live: bool) -> None:
    screen = Screen(is_terminal=live)
    with Console("test", 400, live=live, terminal=screen.terminal) as console:
        took = []
        for step in range(200):
            begin = time.perf_counter()
            console.phase("generate")
            console.step(step, METRICS)
            took.append((time.perf_counter() - begin) / 2)
    assert sorted(took)[len(took) // 2] < 1e-3  # the median: other processes share the machine


def test_remaining_time_ignores_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("miles_lite.console.time.monotonic", lambda: now)
    screen = Screen()
    with plain(screen, num_steps=10) as console:
        console.start_at(4)
        now = 100.0
        console.step(4, {})
        now = 110.0
        console.step(5, {})
    first, second = screen.text.splitlines()
    assert first.endswith("8:20 left")  # nothing better is known: 5 x 100 s
    assert second.endswith("40.0 s left")  # 4 x 10 s


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.5, 1.0], "_-^") == "_-^"
    assert sparkline([2.0, 2.0], "_-^") == "__"
    assert sparkline([math.nan, 1.0, math.inf, 3.0]) == "!▁!█"
    assert sparkline([math.nan], ASCII) == "!"


def test_seconds() -> None:
    assert [seconds(s) for s in (3.21, 245, 7445)] == ["3.2 s", "4:05", "2:04:05"]
