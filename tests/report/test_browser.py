"""The report in a real browser: it draws, filters, explains tokens, and runs nothing of a run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from miles_lite import cli
from miles_lite.types import Verdict
from tests.report.planted import drift_found, group, looked_at, plant

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: run scripts/setup-browser.sh as root"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
HOSTILE = (
    "<img src=x onerror='window.hacked=1'>",
    "</script><script>window.hacked=1</script>",
    "javascript:window.hacked=1//\"'><svg onload=window.hacked=1>",
    "nul \x00 esc \x1b[31m right-to-left \u202egnp.exe zero\u200bwidth lone \ud800",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class View:
    """A page, and all that went wrong or out while it was open."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **context)
        self.page = self.context.new_page()
        self.told: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("dialog", lambda dialog: self.told.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=true]", timeout=120_000)

    def shows(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def fill(self, name: str, value: str) -> str:
        """A filter; what is then said of the samples."""
        self.page.fill(f"[name={name}]", value)
        return self.shows("#count")

    def choose(self, name: str, label: str) -> str:
        self.page.select_option(f"[name={name}]", label=label)
        return self.shows("#count")


@pytest.fixture(scope="module")
def report(small: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "two.html"
    assert cli.run(["report", str(small), str(other), "--out", str(out)]) == 0
    return out


@pytest.fixture
def view(browser: Any, report: Path) -> Iterator[View]:
    view = View(browser, report)
    yield view
    view.context.close()


def test_it_draws_from_the_file_alone(view: View, report: Path) -> None:
    assert view.told == [] and view.requests == [report.as_uri()]
    assert view.page.title() == "small, other – miles-lite report"
    assert view.count("#curve-grid figure") >= 8
    reward = view.page.locator("#curve-grid figure").first
    assert reward.locator(".scatterlayer .trace").count() == 2  # both runs in one chart
    assert "first at step 3" in view.shows("#curve-grid figure:has-text('Gradient norm')")
    for table in ("where the time", "memory by phase", "taught nothing", "physical limit",
                  "plan against measured", "what differs",
                  "drift in parts", "in depth"):  # fmt: skip
        assert view.count(f"table:has(caption:text('{table}'))") == 1, table
    first = view.page.locator(".alarm").first.inner_text()
    assert "critical: first_ratio" in first and "small, step 4" in first


def test_any_metric_can_be_drawn(view: View) -> None:
    before = view.count("#curve-grid figure")
    view.page.select_option("#add-curve", value="rollout/other/7")
    assert view.count("#curve-grid figure") == before + 1
    assert "rollout/other/7" in view.page.locator("#curve-grid figure").first.inner_text()
    assert view.page.locator("#curve-grid figure").first.locator(".trace").count() == 2


def test_samples_are_filtered(view: View) -> None:
    assert view.shows("#count") == "44 of 44 samples"
    assert view.choose("run", "other") == "18 of 44 samples"
    assert view.choose("set", "training") == "16 of 44 samples"
    assert view.choose("verdict", "none: timeout") == "4 of 44 samples"
    assert view.choose("verdict", "graded") == "12 of 44 samples"
    assert view.fill("step-from", "2") == "6 of 44 samples"
    assert view.fill("step-to", "2") == "3 of 44 samples"
    assert view.fill("reward-from", "0.4") == "2 of 44 samples"
    assert view.fill("length-to", "5") == "1 of 44 samples"
    assert "Reward\n1" in view.shows("#sample").replace("\n\n", "\n")
    view.page.click("text=Clear")
    # no wait_for_function: it evaluates a text in the page, which the page's policy refuses
    playwright.expect(view.page.locator("#count")).to_have_text("44 of 44 samples")
    assert view.fill("text", "ANSWER 2") == "10 of 44 samples"
    assert view.fill("text", "no such text") == "0 of 44 samples"
    assert "No sample" in view.shows("#sample") and view.told == []


def test_hovering_a_token_shows_both_log_probs(view: View) -> None:
    view.page.hover("#tokens span >> nth=0")
    rows = view.shows("#tip").split("\n")
    told = dict(zip(rows[::2], rows[1::2], strict=True))
    engine, trainer = float(told["log p, engine"]), float(told["log p, trainer"])
    assert trainer - engine == pytest.approx(0.25, abs=1e-4)
    assert float(told["drift (trainer − engine)"]) == 0.25
    assert float(told["Entropy"]) == pytest.approx(engine**2 / 2, rel=1e-2)
    assert float(told["Advantage"]) == 0.5 and "1 of 5" in told["Token"]
    view.page.hover("h1")
    assert not view.page.is_visible("#tip")


def test_colours_follow_what_is_asked_for(view: View) -> None:
    def colours() -> list[str]:
        return [
            view.page.locator("#tokens span").nth(i).evaluate("e => e.style.backgroundColor")
            for i in range(5)
        ]

    drift = colours()
    assert drift[0] != drift[1]  # 0.25 against 0.001
    view.page.check("[value=advantage]")
    advantage = colours()
    assert len(set(advantage)) == 1 and advantage[0] and "blue above 0" in view.shows("#legend")
    view.page.check("[value=entropy]")
    assert all(colours()) and colours() not in (drift, advantage)
    view.page.check("[value=none]")
    assert not any(colours())


def test_hostile_text_is_shown_and_never_run(browser: Any, tmp_path: Path) -> None:
    """In answers, prompts, labels, verdicts, alarms, settings, names of runs and of metrics."""
    verdicts = [Verdict(0.0, text) for text in HOSTILE]
    groups = [
        group(0, [(text, verdict)] * 2, prompt=text, label=text)
        for text, verdict in zip(HOSTILE, verdicts, strict=True)
    ]
    name = "<img src=x onerror=hacked=1>"
    reasons = {f"reward__invalid__{text}": 0.1 for text in HOSTILE}
    run = plant(
        tmp_path, name, 2, {0: groups},
        {0: looked_at(reward__invalid_ratio=0.9, **reasons)},
        [f"data.template_kwargs.evil=\"{HOSTILE[0]}\""],
    )  # fmt: skip
    (run / "drift.json").write_text(json.dumps(drift_found(HOSTILE[0])))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "eval/<img src=x onerror=hacked=1>": 1.0}\n')
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    view = View(browser, tmp_path / "r.html")
    view.choose("verdict", "any")
    for index in range(view.count("#list button")):
        view.page.locator("#list button").nth(index).click()
        view.page.hover("#tokens span >> nth=0")
    assert view.page.evaluate("window.hacked") is None
    assert view.count("body img") == 0 and view.count("body svg[onload]") == 0
    assert view.told == [] and len(view.requests) == 1
    assert view.fill("text", "</script>") == "2 of 14 samples"
    assert HOSTILE[1] in view.shows("#sample")
    assert view.fill("text", "nul") == "2 of 14 samples"
    assert "nul ␀ esc ␛[31m right-to-left ⟨U+202E⟩gnp.exe zero⟨U+200B⟩width lone ⟨U+D800⟩" in (
        view.shows("#sample")
    )
    view.page.evaluate(
        "for (const text of ['window.hacked=1', '']) document.body.append(Object.assign("
        "document.createElement('script'), text ? {textContent: text} : {src: 'http://a.test'}));"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hacked=1>')"
    )
    view.page.wait_for_timeout(200)
    assert view.page.evaluate("window.hacked") is None  # the policy alone would stop it too
    assert any("Content Security Policy" in line for line in view.told)
    view.context.close()


def test_keys_alone_are_enough(view: View) -> None:
    view.page.keyboard.press("Tab")
    assert view.page.evaluate("document.activeElement.className") == "skip"
    view.page.locator("#list button").nth(1).focus()
    view.page.keyboard.press("Enter")
    assert view.page.locator("#list button").nth(1).get_attribute("aria-current") == "true"
    view.page.focus("#tokens")
    view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("ArrowRight")
    assert "2 of" in view.shows("#tip")
    view.page.keyboard.press("Escape")
    assert not view.page.is_visible("#tip")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_anybody_can_read_it(browser: Any, report: Path, scheme: str) -> None:
    """axe-core: contrast, labels, roles, headings, tables."""
    view = View(browser, report, color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = view.page.evaluate(background) != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert view.page.evaluate("document.documentElement.dataset.theme") == scheme
    view.page.click("summary")
    view.page.hover("#tokens span >> nth=0")
    axe = resources.files("axe_playwright_python") / "axe.min.js"
    view.page.evaluate(axe.read_text(encoding="utf-8"))
    found = view.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    told = [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in found["violations"]]
    assert told == []
    other = {"light": "dark", "dark": "light"}[scheme]
    view.page.select_option("#theme", label=other)
    assert view.page.evaluate("document.documentElement.dataset.theme") == other
    view.context.close()


def test_a_thousand_steps_are_usable(browser: Any, large: Path, tmp_path: Path) -> None:
    assert cli.run(["report", str(large), "--out", str(tmp_path / "r.html")]) == 0
    view = View(browser, tmp_path / "r.html")
    assert view.told == [] and len(view.requests) == 1
    points = "document.querySelector('.plot').data[0].x.length"
    assert view.page.evaluate(points) == 1000
    before = int(view.shows("#count").split()[2].replace(",", ""))
    assert before > 1000
    view.fill("step-from", "990")
    took = view.page.evaluate(
        "(() => { const begin = performance.now(); document.getElementById('filters')"
        ".dispatchEvent(new Event('input')); return performance.now() - begin; })()"
    )
    assert took < 1000  # ms, of filtering all samples
    assert view.count("#list button") == 100 or view.count("#more[hidden]") == 1
    view.context.close()
