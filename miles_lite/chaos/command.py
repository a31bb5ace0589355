"""`miles-lite chaos experiment=NAME --kill KIND,... [key=value ...]`: an undisturbed run, and a
supervised one whose processes are killed at random moments, those of a recovery included."""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
STEPS = 30  # of either run
POLL_S = 0.1
TAIL_BYTES = 1 << 16  # of metrics.jsonl: some lines


@dataclass(slots=True)
class Kill:
    kind: str
    phase: str  # of the loop at that moment
    step: int  # steps trained by then
    recovered_s: float = 0.0  # until such a process was there again and one more step was logged
    lost_steps: int = 0  # trained before and again
    resumed: bool = False  # by a new driver, else within the run


@dataclass(slots=True)
class Wound:
    """A kill that the run has not recovered from."""

    kill: Kill
    victim: psutil.Process
    number: int  # of such processes, then
    restarts: int  # of the driver, by then
    begin: float
    goal: int | None = None  # more steps than these are wanted; None until it is whole again


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the undisturbed run."""

    start_s: float  # until it has drawn the samples of a step
    step_s: float  # saving included
    num_steps: int


class Disturbed:
    """The supervised run. Strikes make wounds; `look` finds which have healed."""

    def __init__(self, folder: Path, supervisor: subprocess.Popen[bytes]) -> None:
        self._folder, self._supervisor = folder, supervisor
        self.wounds: list[Wound] = []
        self.made: list[Kill] = []

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

    def strike(self, kinds: list[str], draw: random.Random) -> bool:
        """Hit one of the first of these kinds that there is, and drop it from them. False if there
        is none, or no driver: what it left is ending anyway."""
        found = self._members()
        if not any(member.kind == "driver" for member in found):
            return False
        for kind in kinds:
            name = kind.removesuffix(HANGS)
            if victims := [member.process for member in found if member.kind == name]:
                break
        else:
            return False
        victim = draw.choice(victims)
        kill = Kill(kind, phase(found), self.trained())
        self.wounds.append(
            Wound(kill, victim, len(victims), self._restarts(), time.monotonic()),
        )
        with suppress(psutil.NoSuchProcess):  # it was first
            victim.send_signal(signal.SIGSTOP if kind != name else signal.SIGKILL)
        self.made.append(kill)
        kinds.remove(kind)
        return True

    def look(self) -> None:
        """Note and tell what has healed. Raises RunError if something does not."""
        ended, trained, found = self.ended, self.trained(), self._members()
        for wound in list(self.wounds):
            kill, took = wound.kill, time.monotonic() - wound.begin
            kill.lost_steps = max(kill.lost_steps, kill.step - trained)
            now = [m.process for m in found if m.kind == kill.kind.removesuffix(HANGS)]
            whole = wound.victim not in now and len(now) >= wound.number
            if wound.goal is None and (whole or kill.kind == "reward"):
                wound.goal = max(kill.step, trained)  # an engine may die while the step ends
            if ended or (wound.goal is not None and trained > wound.goal):
                kill.recovered_s, kill.resumed = took, self._restarts() > wound.restarts
                self.wounds.remove(wound)
                _tell(self.made.index(kill) + 1, kill)
            elif took > RECOVERY_S:
                raise RunError(
                    f"chaos: {RECOVERY_S:g} s after a {kill.kind} process was hit the run had not "
                    f"recovered; see {self._folder}"
                )

    def _members(self) -> list[Member]:
        try:
            return members(psutil.Process(self._supervisor.pid))
        except psutil.NoSuchProcess:
            return []

    def _restarts(self) -> int:
        return len(read_restarts(self._folder))


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
    overrides = _with_defaults(options.overrides)
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
    pace = Pace(
        start_s=stamps[0] - (peace / "config.yaml").stat().st_mtime,
        step_s=(stamps[-1] - stamps[0]) / max(1, len(stamps) - 1),
        num_steps=cfg.train.num_steps,
    )
    print(f"a disturbed one, in {storm}", flush=True)
    with _train(folder, "disturbed", ["--supervise", *settings]) as process:
        made = _disturb(Disturbed(storm, process), kills, options, pace)
        _require(process.wait() == 0, storm)

    found = compare(storm, peace)
    told = {"kills": [dataclasses.asdict(kill) for kill in made], **dataclasses.asdict(found)}
    (folder / "chaos.json").write_text(json.dumps(told, indent=1) + "\n")
    print(
        "\n".join([*_summary(kills, made, options.times), *found.lines(), f"written to {folder}"])
    )
    return 0 if found.same and len(made) == options.times else 1


def _with_defaults(overrides: Sequence[str]) -> list[str]:
    """Little is lost at a kill."""
    defaults = {"checkpoint.every": 1, "train.num_steps": STEPS}
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
    run: Disturbed, kinds: Sequence[str], options: argparse.Namespace, pace: Pace
) -> list[Kill]:
    """While it recovers it is hit again about every second time, so that it gets on."""
    draw = random.Random(options.seed)
    deck: list[str] = []
    _line("", "killed", "phase", "step", "recovered", "steps lost", "by")
    while (left := options.times - len(run.made)) and not run.ended:
        deck = deck or draw.sample(kinds, len(kinds))  # each of them equally often
        steps = (pace.num_steps - run.trained()) / (left + 1)  # a kill
        healthy_s = draw.uniform(0, 2 * steps * pace.step_s)
        hurt_s = draw.uniform(0, 2 * pace.start_s)
        begin = time.monotonic()
        while not run.ended:
            run.look()
            wait_s = hurt_s if run.wounds or not run.trained() else healthy_s
            if time.monotonic() - begin >= wait_s and run.strike(deck, draw):
                break
            time.sleep(POLL_S)
    while run.wounds:
        run.look()
        time.sleep(POLL_S)
    return run.made


def _tell(number: int, kill: Kill) -> None:
    how = "a new driver" if kill.resumed else "the run"
    took, lost = f"{kill.recovered_s:.1f} s", str(kill.lost_steps)
    _line(str(number), kill.kind, kill.phase, str(kill.step), took, lost, how)


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
