"""Metrics: merging in any order, lines that survive a crash, and a W&B that cannot hurt."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_lite.metrics import JsonlSink, Max, Mean, Sum, WandbSink, finish, merge
from miles_lite.types import Completion, Finish, Prompt, Sample, Verdict
from tests import wandb_file

NUMBERS = st.integers(-1000, 1000).map(float) | st.just(math.nan)  # exact in any order
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "sum": st.builds(Sum, NUMBERS),
        "mean": st.builds(Mean, NUMBERS, st.integers(0, 9).map(float)),
        "max": st.builds(Max, NUMBERS | st.just(-math.inf)),
    },
)


@given(PARTS, PARTS, PARTS)
def test_merge_is_associative_and_commutative(a: dict, b: dict, c: dict) -> None:
    expected = finish(merge(a, b, c))
    assert finish(merge(a, merge(b, c))) == pytest.approx(expected, nan_ok=True)
    for order in permutations((a, b, c)):
        assert finish(merge(*order)) == pytest.approx(expected, nan_ok=True)
    assert merge(a, {}) == a


def test_merge_by_hand() -> None:
    ranks = [
        {"s": Sum(1), "m": Mean(6, 2), "x": Max(3)},
        {"s": Sum(2), "m": Mean(0, 1), "x": Max(7), "only": Sum(5)},
    ]
    assert finish(merge(*ranks)) == {"s": 3, "m": 2, "x": 7, "only": 5}


def test_no_number_is_not_zero() -> None:
    assert math.isnan(Mean(0, 0).finish())
    assert math.isnan(Max(-math.inf).finish())
    assert math.isnan(Max(1.0).merge(Max(math.nan)).finish())


def test_one_name_has_one_kind() -> None:
    with pytest.raises(AssertionError, match="train/loss is of several kinds"):
        merge({"train/loss": Sum(1)}, {"train/loss": Max(1)})


# ------------------------------------------------------------------ JSONL


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_is_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(0, {"a": 1.5, "b": math.nan, "c": -math.inf})
    sink.log(1, {"a": 2.0})
    assert lines(path) == [  # before close: each line is on disk when log returns
        {"step": 0, "a": 1.5, "b": None, "c": None, "nonfinite": {"b": "nan", "c": "-inf"}},
        {"step": 1, "a": 2.0},
    ]
    sink.close()


@pytest.mark.parametrize("left", [0, 1, 7, -1])
def test_jsonl_appends_after_a_cut_line(tmp_path: Path, left: int) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(2):
        sink.log(step, {"a": 0.1})
    sink.close()
    whole, cut = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole + cut[:left])
    sink = JsonlSink(path)
    sink.log(1, {"a": 0.2})
    sink.close()
    assert lines(path) == [{"step": 0, "a": 0.1}, {"step": 1, "a": 0.2}]


# ------------------------------------------------------------------ W&B


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    # Set before the sink would, so that it is taken back after the test.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class FakeWandb:
    """Stands in for the module and its run; fails where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in = fails_in
        self.settings: dict[str, Any] = {}
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, float]] = []
        self.Settings = SimpleNamespace

    def _maybe_fail(self, where: str) -> None:
        if self.fails_in == where:
            raise RuntimeError(f"no {where} today")

    def init(self, **settings: Any) -> FakeWandb:
        self._maybe_fail("init")
        self.settings = settings
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, metrics: dict[str, float]) -> None:
        self._maybe_fail("log")
        self.logged.append(metrics)

    def finish(self) -> None:
        self._maybe_fail("finish")

    def teardown(self) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, no_login: None) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_wandb_axes(fake: FakeWandb, tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, project="p", name="n", config={"lr": 1e-6})
    sink.log(3, {"train/loss": 1.0, "train/step": 6, "perf/step_time": 2.0})
    sink.log(4, {"train/loss": 0.5, "train/step": 8, "eval/aime": 0.1})
    sink.close()
    assert fake.defined == [
        ("rollout/step", None),
        ("perf/*", "rollout/step"),
        ("train/step", None),
        ("train/*", "train/step"),
        ("eval/step", None),
        ("eval/*", "eval/step"),
    ]
    assert fake.logged == [
        {"train/loss": 1.0, "train/step": 6, "perf/step_time": 2.0, "rollout/step": 3},
        {"train/loss": 0.5, "train/step": 8, "eval/aime": 0.1, "eval/step": 4},
    ]
    assert fake.settings["dir"] == str(tmp_path)
    assert fake.settings["config"] == {"lr": 1e-6}


def test_wandb_goes_online_only_with_a_login(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode() -> str:
        WandbSink(tmp_path, project="p", name="n")
        return fake.settings["mode"]

    assert mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_an_error_of_wandb_is_seen_and_survived(
    where: str, fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails_in = where
    with caplog.at_level(logging.WARNING):
        sink = WandbSink(tmp_path, project="p", name="n")
        sink.log(0, {"train/loss": 1.0})
        sink.close()
    assert sink.num_errors == 1
    assert f"no {where} today" in caplog.text


def test_a_missing_wandb_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_login: None
) -> None:
    for nothing in (None, SimpleNamespace()):  # not installed; a mere folder of that name
        monkeypatch.setitem(sys.modules, "wandb", nothing)  # type: ignore[arg-type]
        with pytest.raises(ImportError, match="wandb"):
            WandbSink(tmp_path, project="p", name="n")


@pytest.mark.usefixtures("no_login")
def test_wandb_offline_run_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb").init  # noqa: B018 - a folder named wandb would not do
    ids = []
    for step in range(2):
        sink = WandbSink(tmp_path, project="p", name="n")
        sink.log(step, {"train/loss": 1.0, "perf/imbalance": 1.1})
        sink.close()
        assert sink.num_errors == 0
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    assert {file.stem for file in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{ids[0]}"}


@pytest.mark.usefixtures("no_login")
def test_an_offline_run_has_samples_settings_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink(tmp_path, project="p", name="n", group="tiny", config={"optim": {"lr": 2.0}})
    hostile = "<script>\x00\u202e\x1b[2J"
    prompt = Prompt("set:1", (), "What is 1+1?", "2", "", {})
    answer = Completion((1,), (-0.5,), 0, Finish.stop)
    for step in (20, 21):
        sink.log_samples(step, [Sample(prompt, answer, hostile, Verdict(0.0, "timeout"))])
    sink.close()
    assert sink.num_errors == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_file.config(file)["optim"] == {"lr": 2.0}
    (line,) = wandb_file.history(file)
    assert line["rollout/step"] == 20 and line["rollout/samples/nrows"] == 1
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/rollout/*.json")
    assert json.loads(table.read_text())["data"] == [
        [20, "What is 1+1?", hostile, "2", 0.0, "timeout"]
    ]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"0123456789abcdef" not in path.read_bytes(), path


# ------------------------------------------------------------------ W&B that does not answer


def own(code: str, tmp_path: Path, **env: str) -> tuple[float, str, list[dict[str, Any]]]:
    """Seconds, the log and what the file holds of a process that logs to a sink `code` disturbs."""
    script = f"""
import logging, os, signal, sys, psutil
from pathlib import Path
from miles_lite import metrics
logging.basicConfig(level=logging.WARNING)
metrics.INIT_S, metrics.PATIENCE_S = 1, 3.0
def disturb(signum):
    [service] = [c for c in psutil.Process().children() if c.name() == metrics.SERVICE]
    service.send_signal(signum)
sink = metrics.WandbSink(Path({str(tmp_path)!r}), project="p", name="n")
sink.log(0, {{"train/loss": 1.5}})
{code}
sink.close()
"""
    begin = time.monotonic()
    command = [sys.executable, "-c", script]
    env = {**os.environ, "WANDB_API_KEY": "0" * 40, **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    took = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-4000:]
    files = tmp_path.glob("wandb/offline-run-*/*.wandb")
    return took, done.stderr, [line for file in files for line in wandb_file.history(file)]


@pytest.mark.parametrize("backlog", [0, 100], ids=["closed", "silent"])
def test_without_its_server_it_goes_on_offline(backlog: int, tmp_path: Path) -> None:
    pytest.importorskip("wandb").init  # noqa: B018
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if backlog:
            server.listen(backlog)  # takes connections and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        took, told, lines = own("", tmp_path, WANDB_BASE_URL=url, WANDB_MODE="online")
    assert took < 60
    assert "W&B failed to start (error 1)" in told and "`wandb sync` sends it from" in told
    assert [line["train/loss"] for line in lines] == [1.5]


@pytest.mark.parametrize(
    ("when", "signum"),
    [("step", signal.SIGKILL), ("step", signal.SIGSTOP), ("end", signal.SIGSTOP)],
)
def test_its_process_holds_nothing_up(when: str, signum: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("wandb").init  # noqa: B018
    code = f"disturb({signum:d})"
    if when == "step":  # enough for a socket that nobody reads to be full
        code += "\nfor n in range(300): sink.log(n, {f'perf/{i}': float(n) for i in range(500)})"
        code += "\nprint('LOGGED', file=sys.stderr)"
    took, told, _ = own(code, tmp_path, WANDB_MODE="offline")
    assert took < 60
    assert ("LOGGED" in told) == (when == "step")
    assert f"W&B failed to {'log' if when == 'step' else 'finish'}" in told
    assert signum is signal.SIGKILL or "is killed" in told


def test_the_dashboard_draws_metrics_that_exist_against_their_axes() -> None:
    from miles_lite import dashboard

    pytest.importorskip("wandb_workspaces")
    made = dashboard.workspace("entity", "project")
    assert [section.name for section in made.sections] == list(dashboard.PANELS)
    drawn = [panel for section in made.sections for panel in section.panels]
    known = {panel.x for panel in drawn}
    assert {str(getattr(x, "name", x)) for x in known} == {"rollout/step", "train/step"}
    assert made._to_model().entity == "entity"  # what would be sent can be made


def test_a_dashboard_without_login_says_how(no_login: None) -> None:
    from miles_lite import dashboard

    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        dashboard.command(["--project", "p", "--entity", "e"])
