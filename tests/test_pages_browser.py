"""Every report in a real Chromium: no complaint, nothing wider than the window, legible text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from feature_stores import GROUP, LAYER, build_store
from playwright.sync_api import expect

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.bench import save_report
from qwen_scope_lens.bench.analysis import analyse
from qwen_scope_lens.bench.suite import Benchmark, Suite
from qwen_scope_lens.classify.comparison import Error, Growth, Report, Row
from qwen_scope_lens.classify.report import report_page
from qwen_scope_lens.classify.scores import At, Scores
from qwen_scope_lens.compare import drift, drift_page
from qwen_scope_lens.pages import Page
from qwen_scope_lens.steering.sweep import CONTROL, PLAN, Dose, Sweep
from qwen_scope_lens.stores import FeatureStore
from qwen_scope_lens.synth.report import Report as Synthesis
from qwen_scope_lens.synth.targets import Target, TargetSet

pytestmark = pytest.mark.browser

LONG = "a long text, as corpora have them, " * 8 + "w" * 70
NAMES = ("sums", "capitals of lands", "words 言葉")


def stores(folder: Path, shift: int) -> FeatureStore:
    """Short documents; the features differ by `shift`, and one fires on every token."""
    rng = np.random.default_rng(shift)
    documents = [
        [{int(f) + shift: 1.0 for f in [50, *rng.integers(0, 20, 4)]} for _ in range(3)]
        for _ in range(24)
    ]
    return build_store(folder, documents, texts=[f"t{n:02d}" for n in range(24)])


def bench(folder: Path) -> Path:
    """With two matrices, each with a colour bar."""
    read = [
        Benchmark(name, stores(folder / str(n), 7 * n), {"source": "a table"})
        for n, name in enumerate(NAMES)
    ]
    path = folder / "bench.html"
    save_report(analyse(Suite(folder, tuple(read)), LAYER, draws=5), path)
    return path


def drifted(folder: Path) -> Page:
    before, after = (stores(folder / f"drift-{n}", 400 * n) for n in (0, 1))
    found = drift(before, after)
    assert found.layers[LAYER].changed.any()
    return drift_page(found, {f"{GROUP}/{LAYER}/3": LONG}, "../site/")


def classified() -> Page:
    scores = Scores(100, 40, 0.8, 0.7, 0.9, 0.75, 0.85)
    names = ("own thresholds, 5 features", "difference of means on the residual", "always yes")
    rows = [Row(name, scores, {"zh": scores}, None, None) for name in names]
    growth = [Growth(rule, (1, 2, 32), (scores,) * 3) for rule in ("or", "k-of-n", "thresholds")]
    errors = [Error(7, LONG, False, 1.0, (f"{GROUP}/{LAYER}/3 95.69 on 'x', token 36",), "zh")]
    features = tuple((f"{GROUP}/{LAYER}/{n}", 0.5) for n in range(3))
    at = At("precision", 0.9)
    layers = {LAYER: 0.5}
    return report_page(
        Report(
            tuple(rows), tuple(growth), tuple(errors), at, 80, 100, features, layers, ("zh",), ""
        )
    )


def swept() -> Page:
    doses = [Dose(PLAN, 0, 0, 0, 0, 5.0, 0.1, LONG)]
    for arm in (PLAN, CONTROL):
        doses += [Dose(arm, n, n / 9, 0, n / 5, 5.0 + n, 0.1, LONG) for n in (1, 2, 8)]
    settings = {"model": {"id": "mini-qwen3", "fingerprint": "all-weights:" + 64 * "a"}}
    plan = f"{GROUP}/{LAYER}/3:add@both"
    return Sweep(plan, "raw", "change", "a share", settings | {"prompts": 3}, tuple(doses)).page()


def synthesised() -> Page:
    targets = tuple(Target(FeatureRef(GROUP, LAYER, n), description=LONG) for n in range(3))
    return Synthesis(
        TargetSet(targets, task="a task"),
        candidates=4,
        kept=2,
        outcomes=Counter({"kept": 2, "the feature does not fire": 2}),
        types=Counter({("text", "vanilla"): 2}),
        per_feature=np.array([0, 2, 0]),
        activations=np.array([1.0, 2.0]),
        curve=np.array([0.1, 0.2, 0.5]),
        synthetic_only=0.4,
        uncovered=(targets[0].ref,),
        verified="prompt",
        budget="",
    ).page()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file per report of the package."""
    folder = tmp_path_factory.mktemp("reports")
    pages = {
        "drift": drifted(folder),
        "classify": classified(),
        "sweep": swept(),
        "synth": synthesised(),
    }
    return [bench(folder), *(page.save(folder / f"{name}.html") for name, page in pages.items())]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours, given as `rgb(r, g, b)`."""

    def light(colour: str) -> float:
        parts = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_reports_are_shown_whole(reports: list[Path], browser: Browser, scheme: Any) -> None:
    ground = "#ffffff" if scheme == "light" else "#121212"  # Chromium's own
    paper = "rgb({}, {}, {})".format(*(int(ground[i : i + 2], 16) for i in (1, 3, 5)))
    with browser.page(color_scheme=scheme) as page:
        for path in reports:
            page.goto(path.as_uri())
            for width in (390, 1280):
                page.set_viewport_size({"width": width, "height": 800})
                wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert wide <= 0, f"{path.name} is {wide} pixels wider than {width}"
            assert page.locator("svg").count() > 0
            assert page.locator("svg image").count() == 0
            for part in ("figcaption", "svg text", "td"):
                shown = page.locator(part).first.evaluate(
                    "e => { const s = getComputedStyle(e);"
                    " return e.ownerSVGElement ? s.fill : s.color }"
                )
                assert contrast(shown, paper) >= 4.5, f"{path.name}: {part} is {shown}"


def test_a_picture_that_is_blocked_is_a_complaint(tmp_path: Path, browser: Browser) -> None:
    """The policy of pages is as strict as it says, and the fixture sees what it blocks."""
    picture = "<svg><image href='data:image/png;base64,iVBORw0KGgo='/></svg>"
    path = Page("t").figure(picture).save(tmp_path / "page.html")
    with browser.page() as page:
        page.goto(path.as_uri())
        expect(page.locator("svg")).to_be_attached()
        page.wait_for_timeout(200)
    assert "Content Security Policy" in " ".join(browser.complaints)
    browser.complaints.clear()
