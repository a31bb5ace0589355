"""What a person sees of a run: one live view in a terminal, plain lines anywhere else.

The live view owns the last few lines of the terminal. All that is printed or logged meanwhile
appears above it, and an exception finds the terminal as it was. A call only notes what happened
(well under a millisecond); a thread of rich draws four times a second.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Timer
from types import TracebackType

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles_lite.log import printable
from miles_lite.protocols import Metrics

# What is shown of a step: title, metric, format, and whether the view draws its history.
SHOWN = (
    ("reward", "rollout/raw_reward", "{:.3f}", True),
    ("drift", "train/train_rollout_logprob_abs_diff", "{:.2e}", True),
    ("response", "rollout/response_len/mean", "{:,.1f} tokens", False),
    ("step", "perf/step_time", "{:,.1f} s", False),
    ("rollout", "perf/rollout_tokens_per_s", "{:,.0f} tokens/s", False),
    ("train", "perf/actor_train_tok_per_s", "{:,.0f} tokens/s", False),
)
HISTORY = 48  # steps in a sparkline
SLOW_PHASE_S = 10.0  # without a terminal, a phase that takes longer gets lines of its own


class Console:
    """A context around the loop. Every method may be called from the driver's main thread only."""

    def __init__(
        self,
        experiment: str,
        num_steps: int,
        *,
        live: bool | None = None,
        terminal: Terminal | None = None,
        slow_phase_s: float = SLOW_PHASE_S,
    ) -> None:
        """live: whether to draw; None asks stdout. terminal: where to."""
        self._experiment = printable(experiment)
        self._num_steps = num_steps
        self._terminal = terminal or Terminal(highlight=False, soft_wrap=live is False)
        if live is None:
            live = sys.stdout.isatty() and not self._terminal.is_dumb_terminal
        self._slow_phase_s = slow_phase_s
        self._details: Callable[[], str] = str
        self._alarm: Timer | None = None
        self._done = 0  # steps
        self._phase = "start"
        self._phase_begin = self._step_begin = time.monotonic()
        self._phase_times: dict[str, deque[float]] = {}  # the latest of each phase
        self._step_phases: dict[str, float] = {}  # of the step under way: seconds
        self._step_times: list[float] = []
        self._metrics: Metrics = {}
        self._history: dict[str, list[float]] = {name: [] for _, name, _, drawn in SHOWN if drawn}
        self._live = None
        if live:  # last: it asks for the view at once
            self._live = Live(
                console=self._terminal, get_renderable=self._view, refresh_per_second=4
            )

    def __enter__(self) -> Console:
        self._phase_begin = self._step_begin = time.monotonic()
        if self._live:
            self._live.start(refresh=True)
        else:
            self._arm(self._slow_phase_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the terminal back. Errors pass through; Python prints them below the last view."""
        self._disarm()
        if self._live:
            self._live.stop()
        if error is not None:
            took = time.monotonic() - self._phase_begin
            self._line(f"{self._position()}: ended in {self._phase} after {seconds(took)}")

    def start_at(self, step: int) -> None:
        """So many steps were done by an earlier attempt. The next one begins now: what it took to
        start is no measure of those to come."""
        self._done = step
        self._step_begin = time.monotonic()

    def watch(self, details: Callable[[], str]) -> None:
        """Ask this for a few words on how far a phase is and who is waited for. It is called from
        other threads."""
        self._details = details

    def phase(self, name: str) -> None:
        """A phase begins, and with it the one before ends."""
        self._end_phase()
        self._phase = printable(name)
        self._disarm()
        if not self._live:
            self._arm(self._slow_phase_s)

    def _end_phase(self) -> None:
        now = time.monotonic()
        took = now - self._phase_begin
        self._phase_times.setdefault(self._phase, deque(maxlen=20)).append(took)
        self._step_phases[self._phase] = self._step_phases.get(self._phase, 0.0) + took
        self._phase_begin = now

    def step(self, step: int, metrics: Metrics) -> None:
        """Step number `step` (from 0) is done."""
        self._end_phase()
        self._step_times.append(self._phase_begin - self._step_begin)
        self._step_begin = self._phase_begin
        phases, self._step_phases = self._step_phases, {}
        self._done = step + 1
        self._metrics = metrics
        for name, values in self._history.items():
            values.append(metrics.get(name, math.nan))
            del values[:-HISTORY]
        if not self._live:
            shown = [f"{title} {text}" for title, text in _shown(metrics)]
            shown += [f"{name} {seconds(took)}" for name, took in phases.items() if took >= 0.05]
            shown += [self._left()] if self._done < self._num_steps else []
            self._line(f"step {self._done}/{self._num_steps}: " + ", ".join(shown))

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """Held-out results of the weights after `step` steps: a line that stays."""
        bounds = ("-low", "-high")  # of intervals, which are for files and charts
        shown = [f"{n} {value:.4g}" for n, value in metrics.items() if not n.endswith(bounds)]
        self._line(f"evaluation after {step} steps: " + ", ".join(shown))

    def summary(self, lines: Sequence[str]) -> None:
        """Closing words. Call it after the context has ended, so that they come last."""
        for line in lines:
            self._line(line)

    # -------------------------------------------------------------- inside

    def _position(self) -> str:
        """The step now under way; the last one when all are done."""
        return f"step {min(self._done + 1, self._num_steps)}/{self._num_steps}"

    def _left(self) -> str:
        """Time to the end of the run, "" when unknown: each step to come takes the median of the
        recent ones. The first step warms up and is left out as soon as there is another.
        """
        recent = self._step_times[1:][-20:] or self._step_times
        if not recent:
            return ""
        left_s = (self._num_steps - self._done) * statistics.median(recent)
        return f"{seconds(max(0.0, left_s - (time.monotonic() - self._step_begin)))} left"

    def _line(self, line: str) -> None:
        text = Text(printable(line))
        try:
            self._terminal.print(text, soft_wrap=True)
        except OSError:  # nobody reads any more (closed pipe, lost terminal): no reason to stop
            pass

    def _progress(self) -> str:
        """Elapsed and expected time of the phase, and how far it is."""
        text = seconds(time.monotonic() - self._phase_begin)
        if known := self._phase_times.get(self._phase):
            text += f" of about {seconds(statistics.median(known))}"
        details = printable(self._details())
        return f"{text}, {details}" if details else text

    def _arm(self, delay_s: float) -> None:
        """Every line takes twice as long to come as the one before."""
        self._alarm = Timer(delay_s, self._still, (self._phase_begin, 2 * delay_s))
        self._alarm.daemon = True
        self._alarm.start()

    def _still(self, phase_begin: float, next_s: float) -> None:
        """Runs in the alarm's thread."""
        if phase_begin == self._phase_begin:
            left = f", {told}" if (told := self._left()) else ""
            self._line(f"{self._position()}: {self._phase}, {self._progress()}{left}")
            self._arm(next_s)

    def _disarm(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = None

    def _view(self) -> RenderableType:
        """Runs in rich's thread, or on entry and exit."""
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._experiment, "bold"),
            ProgressBar(self._num_steps, self._done, width=24),
            Text(self._position()),
            Text(f"{self._phase} {self._progress()}", "cyan"),
            Text(self._left()),
        )
        body = Table.grid(padding=(0, 2))
        fancy = self._terminal.encoding.startswith("utf")
        for title, name, form, drawn in SHOWN:
            if drawn and name in self._metrics:
                value = form.format(self._metrics[name])
                line = sparkline(self._history[name], BLOCKS if fancy else ASCII)
                body.add_row(Text(f"  {title}"), Text(value, justify="right"), Text(line, "green"))
        rest = [f"{title} {text}" for title, text in _shown(self._metrics, drawn=False)]
        up = [name.removeprefix("alarms/") for name in self._metrics if name.startswith("alarms/")]
        alarms = [Text("  alarms: " + ", ".join(up), "bold red")] if up else []
        return Group(head, body, Text("  " + "   ".join(rest)), *alarms)


BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def sparkline(values: Sequence[float], marks: str = BLOCKS) -> str:
    """One mark a value, from the lowest to the highest of them; "!" for NaN or infinity."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "!" * len(values)
    low, top = min(finite), max(finite)
    scale = (len(marks) - 1) / (top - low) if top > low else 0.0
    return "".join(
        marks[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values
    )


def seconds(duration: float) -> str:
    """3.2 s, 4:05 (minutes) or 2:04:05."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(metrics: Mapping[str, float], drawn: bool | None = None) -> list[tuple[str, str]]:
    """Titles and formatted values of what this step has. drawn: only those (not) in a sparkline."""
    return [
        (title, form.format(metrics[name]))
        for title, name, form, has_history in SHOWN
        if name in metrics and drawn in (None, has_history)
    ]
