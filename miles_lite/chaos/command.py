"""`miles-lite chaos experiment=NAME --kill KIND,... [key=value ...]`: an undisturbed run, and a
supervised one whose processes are killed at random moments, one after the other recovers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import psutil

from miles_lite.chaos.compare import compare
from miles_lite.chaos.processes import KINDS, Member, members, phase
from miles_lite.compose import compose
from miles_lite.orphan import die_with
from miles_lite.run import RunError
from miles_lite.summary import read_restarts

HANGS = "-hang"  # a kind with this is stopped (SIGSTOP) and not killed
RECOVERY_S = 600.0
STEPS_A_KILL = 3
POLL_S = 0.1
TAIL_BYTES = 1 << 16  # of metrics.jsonl: some lines


@dataclass(frozen=True, slots=True)
class Kill:
    kind: str
    phase: str  # of the loop at that moment
    step: int  # steps trained by then
    recovered_s: float  # until such a process was there again and one more step was logged
    lost_steps: int  # trained before and again
    resumed: bool  # by a new driver, else within the run


class Disturbed:
    """The supervised run. Consumes moments, produces Kills; waits for recovery after each."""

    def __init__(self, folder: Path, supervisor: subprocess.Popen[bytes]) -> None:
        self._folder, self._supervisor = folder, supervisor

    @property
    def ended(self) -> bool:
        return self._supervisor.poll() is not None

    def trained(self) -> int:
        """Steps logged by now."""
        log = self._folder / "metrics.jsonl"
        if not log.is_file():
            return 0
        with log.open("rb") as file:
            start = max(0, log.stat().st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[start > 0 : -1]
        trained = [line for line in lines if b'"perf/step_time"' in line]
        return json.loads(trained[-1])["step"] + 1 if trained else 0

    def kill(self, kind: str, draw: random.Random) -> Kill | None:
        """One of that kind, as soon as there is one. None if the run ended before or meanwhile."""
        name = kind.removesuffix(HANGS)
        victims: list[Member] = []

        def found() -> bool:
            victims[:] = [m for m in self._members() if m.kind == name]
            return bool(victims)

        if not self._wait(found, f"there is no {name} process"):
            return None
        victim = draw.choice(victims).process
        at, step, restarts = phase(self._members()), self.trained(), self._restarts()
        victim.send_signal(signal.SIGSTOP if kind != name else signal.SIGKILL)
        begin, lowest = time.monotonic(), step

        def whole() -> bool:
            nonlocal lowest
            lowest = min(lowest, self.trained())
            now = [m.process for m in self._members() if m.kind == name]
            return name == "reward" or (victim not in now and len(now) >= len(victims))

        def trains() -> bool:
            nonlocal lowest
            lowest = min(lowest, now := self.trained())
            return now > goal

        recovered = self._wait(whole, f"the {name} process did not come again")
        goal = max(step, self.trained())  # an engine may die while the trainer ends the step
        if not (recovered and self._wait(trains, f"no step after the {name} process came again")):
            return None
        took = time.monotonic() - begin
        return Kill(kind, at, step, took, step - lowest, self._restarts() > restarts)

    def _members(self) -> list[Member]:
        try:
            return members(psutil.Process(self._supervisor.pid))
        except psutil.NoSuchProcess:
            return []

    def _restarts(self) -> int:
        return len(read_restarts(self._folder))

    def _wait(self, condition: Callable[[], bool], failure: str) -> bool:
        """False if the run ended first. Raises RunError at the deadline."""
        deadline = time.monotonic() + RECOVERY_S
        while not self.ended:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise RunError(f"chaos: {failure} within {RECOVERY_S:g} s; see {self._folder}")
            time.sleep(POLL_S)
        return False


def run(words: Sequence[str]) -> int:
    """0 if the disturbed run ended as the undisturbed one did, else 1."""
    parser = argparse.ArgumentParser(prog="miles-lite chaos", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    kinds = f"of {', '.join(KINDS)}; with {HANGS}, e.g. engine{HANGS}, it is stopped instead"
    parser.add_argument("--kill", default="engine,trainer,driver,reward", help=kinds)
    parser.add_argument("--times", type=int, default=10, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and victims")
    options = parser.parse_intermixed_args(words)
    kills = options.kill.split(",")
    if wrong := [kind for kind in kills if kind.removesuffix(HANGS) not in KINDS]:
        raise ValueError(f"--kill {','.join(wrong)}: there are {', '.join(KINDS)}, and {HANGS}")
    if options.times < 1:
        raise ValueError(f"--times {options.times}: wanted at least 1")
    overrides = _with_defaults(options.overrides, options.times)
    cfg = compose(overrides)
    if not cfg.log.samples:
        raise ValueError("log.samples=false: chaos compares the samples of both runs")
    name = cfg.log.name or f"chaos-{cfg.experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = cfg.log.folder / name
    if folder.exists():
        raise ValueError(f"{folder} exists: chaos compares whole runs, choose another log.name")
    folder.mkdir(parents=True)
    settings = [o for o in overrides if not o.startswith(("log.name=", "log.folder="))]
    settings.append(f"log.folder={folder}")

    peace, storm = folder / "undisturbed", folder / "disturbed"
    print(f"an undisturbed run of {cfg.train.num_steps} steps, in {peace}", flush=True)
    with _train(folder, "undisturbed", settings) as process:
        _require(process.wait() == 0, peace)
    stamps = sorted(file.stat().st_mtime for file in peace.glob("samples/step_*"))
    period_s = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)  # of a step, its saving included
    print(f"a disturbed one, in {storm}", flush=True)
    forever = ["--supervise", "--restarts", str(10 * options.times)]
    with _train(folder, "disturbed", [*forever, *settings]) as process:
        made = _disturb(Disturbed(storm, process), kills, options, period_s)
        _require(process.wait() == 0, storm)

    found = compare(storm, peace)
    told = {"kills": [dataclasses.asdict(kill) for kill in made], **dataclasses.asdict(found)}
    (folder / "chaos.json").write_text(json.dumps(told, indent=1) + "\n")
    print(
        "\n".join([*_summary(kills, made, options.times), *found.lines(), f"written to {folder}"])
    )
    return 0 if found.same and len(made) == options.times else 1


def _with_defaults(overrides: Sequence[str], times: int) -> list[str]:
    """Little is lost at a kill, and there are steps enough for all of them."""
    defaults = {"checkpoint.every": 1, "train.num_steps": STEPS_A_KILL * times + 5}
    given = {override.partition("=")[0] for override in overrides}
    return [*(f"{k}={v}" for k, v in defaults.items() if k not in given), *overrides]


@contextmanager
def _train(folder: Path, name: str, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`miles-lite train`, with a log beside its folder."""
    command = [sys.executable, "-m", "miles_lite.cli", "train", *words, f"log.name={name}"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with, os.getpid()),
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _require(fine: bool, run: Path) -> None:
    if not fine:
        raise RunError(f"chaos: the run in {run} did not finish: its end is in {run}.log")


def _disturb(
    run: Disturbed, kinds: Sequence[str], options: argparse.Namespace, period_s: float
) -> list[Kill]:
    draw = random.Random(options.seed)
    made: list[Kill] = []
    deck: list[str] = []
    _line("", "killed", "phase", "step", "recovered", "steps lost", "by")
    while len(made) < options.times and not run.ended:
        if run.trained():  # the first kill may as well fall into the start
            time.sleep(draw.uniform(0, 2 * period_s))
        deck = deck or draw.sample(kinds, len(kinds))  # each of them equally often
        if kill := run.kill(deck.pop(), draw):
            made.append(kill)
            how = "a new driver" if kill.resumed else "the run"
            number, took = str(len(made)), f"{kill.recovered_s:.1f} s"
            _line(number, kill.kind, kill.phase, str(kill.step), took, str(kill.lost_steps), how)
    return made


def _line(*cells: str) -> None:
    widths = (4, 14, 10, 6, 10, 11, 0)
    print(" ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)), flush=True)


def _summary(kinds: Sequence[str], made: Sequence[Kill], times: int) -> list[str]:
    lines = [f"kills made         {len(made)} of {times}"]
    if len(made) < times:
        lines[0] += ": the run ended before; raise train.num_steps"
    for kind in kinds:
        if took := [kill.recovered_s for kill in made if kill.kind == kind]:
            lost = sum(kill.lost_steps for kill in made if kill.kind == kind)
            lines.append(
                f"{kind:<18} {len(took)} times, recovered in {statistics.median(took):.1f} s "
                f"(at most {max(took):.1f} s), {lost} steps lost"
            )
    return lines
