"""`miles-lite report RUN [RUN2 ...]`: what runs did, as one HTML file."""

from __future__ import annotations

import argparse
import os
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from miles_lite.log import say
from miles_lite.report.page import render
from miles_lite.report.runs import read_runs


def run(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="miles-lite report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="RUN/report.html by default")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    options = parser.parse_args(words)
    runs = read_runs(options.runs)
    out = options.out or options.runs[0] / "report.html"
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    page = render(runs)
    part = out.with_name(f".{out.name}.part")
    part.write_text(page.html, encoding="utf-8")
    os.replace(part, out)
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB. {page.samples.told}")
    if page.stride > 1:
        print(f"Curves show every {page.stride}th step, to keep the file small.")
    if options.open and not webbrowser.open(out.resolve().as_uri()):
        print("No browser could be started: open the file yourself")
