"""The file as a whole: its size, and what of a run's text is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from miles_lite import cli
from miles_lite.report import page


@pytest.mark.slow
def test_a_thousand_steps_and_ten_thousand_samples_stay_small(
    large: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.html"
    assert cli.run(["report", str(large), str(small), "--out", str(out)]) == 0
    assert 2_000_000 < out.stat().st_size < 5_000_000
    said = capsys.readouterr().out
    assert f"{out}: 4." in said and "of 10,028 samples" in said


def test_the_file_asks_for_nothing(small: Path) -> None:
    """Beyond its base64 there is no address, and no markup of the run."""
    html = page.render(page_runs(small)).html
    plain = re.sub(r'octet-stream" id="[\w-]+">[\w+/=]*<', "", html)
    assert len(plain) < 60_000
    assert "http:" not in plain and "https:" not in plain and "src=" not in plain
    assert "default-src 'none'" in plain and "'unsafe-eval'" not in plain
    assert "What is 2+2" not in plain and "optim.lr" not in plain


def page_runs(folder: Path) -> list:
    from miles_lite.report.runs import read_runs

    return read_runs([folder])


def test_curves_of_very_long_runs_are_thinned(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.render(page_runs(small)).stride == 1
    monkeypatch.setattr(page, "SERIES_BYTES", 2_000)
    assert page.render(page_runs(small)).stride > 1


def test_without_plotly_the_way_out_is_said(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert cli.run(["report", str(small)]) == 2
    assert "pip install 'miles-lite[report]'" in capsys.readouterr().err
    assert not (small / "report.html").exists()


def test_a_run_being_written_and_open(
    other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert cli.run(["report", str(other), "--open"]) == 0
    assert opened == [(other / "report.html").as_uri()]
    assert "All 18 samples" in capsys.readouterr().out


def test_a_wrong_place_is_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(small), "--out", str(small / "no" / "r.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
