"""The one file: page, script, style, plotting library, series and samples, all inside.

Nothing that a run says is written as markup. It travels as base64 of compressed JSON, and page.js
puts it into the page as text only; the page's security policy lets no script run but its own two,
known by their hashes, and no request go out.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from typing import Any

from miles_lite.report import drift, names, sections, waste
from miles_lite.report.runs import RunData
from miles_lite.report.samples import Chosen, choose

MAX_BYTES = 4_900_000
SERIES_BYTES = 1_500_000  # of the file; more than this is drawn with fewer steps
_WIDENED = 4 / 3  # base64


@dataclass(frozen=True, slots=True)
class Page:
    html: str
    samples: Chosen
    stride: int  # every so many steps are drawn


def render(runs: Sequence[RunData]) -> Page:
    """Raises ValueError if plotly is not installed."""
    package = resources.files("miles_lite.report")
    template, style, script = (
        (package / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    plotly = _plotly()
    stride, series = _series(runs)
    data = _base64(_packed(_data(runs)))
    # numbers are put in where the template says; what is left of the file's size is for samples
    parts = {
        "style": style,
        "script": script,
        "policy": _policy(script, plotly),
        "plotly": _base64(gzip.compress(plotly.encode(), 9, mtime=0)),
        "series": series,
        "data": data,
    }
    left = MAX_BYTES - len(template) - sum(map(len, parts.values())) - 4096
    chosen = choose(runs, int(left / _WIDENED))
    said = {"told": chosen.told, "notes": chosen.notes, "stride": stride}
    parts |= {"samples": _base64(chosen.packed), "said": _base64(_packed(said))}
    html = template
    for name, text in parts.items():
        assert html.count(f"<!--{name}-->") == 1, name
        html = html.replace(f"<!--{name}-->", text)
    return Page(html, chosen, stride)


def _data(runs: Sequence[RunData]) -> dict[str, Any]:
    metrics = sorted({name for run in runs for m in run.metrics.values() for name in m})
    tables = {
        "overview": sections.overview(runs),
        "step_time": sections.step_time_table(runs),
        "memory": sections.memory_table(runs),
        "limits": sections.limits(runs),
        "ledger": waste.ledger(runs),
        "planned": sections.planned(runs),
        "drift": drift.parts(runs),
        "causes": drift.causes(runs),
        "differences": sections.differences(runs),
        "configuration": sections.configuration(runs),
    }
    return {
        "runs": [{"name": run.name, "outcome": run.outcome} for run in runs],
        "alarms": sections.alarms(runs),
        "tables": tables,
        "memory": [sections.memory(run) for run in runs],
        "words": {name: names.words(name) for name in metrics},
        "headlines": names.HEADLINES,
        "logScale": names.LOG_SCALE,
    }


def _series(runs: Sequence[RunData]) -> tuple[int, str]:
    """(stride, packed): all steps, or every 2nd, 4th, ... until they fit."""
    stride = 1
    while True:
        packed = _packed(
            {
                "metrics": [sections.series(run, stride) for run in runs],
                "stepTime": [sections.step_time(run, stride) for run in runs],
            }
        )
        longest = max(len(run.metrics) for run in runs)
        if len(packed) * _WIDENED <= SERIES_BYTES or stride >= longest:
            return stride, _base64(packed)
        stride *= 2


def _packed(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, default=dataclasses.asdict, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode("ascii"), 9, mtime=0)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _policy(*scripts: str) -> str:
    hashes = [_base64(hashlib.sha256(script.encode()).digest()) for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    # styles: plotly writes its own; images: what it draws to save a chart
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _plotly() -> str:
    if find_spec("plotly") is None:
        raise ValueError("plotly is not installed: pip install 'miles-lite[report]'")
    source = resources.files("plotly") / "package_data" / "plotly.min.js"
    # a carriage return would not survive the way into a script element, and break its hash
    return source.read_text(encoding="utf-8").replace("\r\n", "\n")
