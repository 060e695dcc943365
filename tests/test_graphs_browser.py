"""The page of a feature graph in a real Chromium: nodes, groups, and the view in the address."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from browser import open_browser
from playwright.sync_api import expect
from test_graphs import planted

from qwen_scope_lens.graphs.page import save_page

pytestmark = pytest.mark.browser

HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_a_graph_is_walked_through(tmp_path: Path) -> None:
    graph = planted()
    named = tuple(replace(node, label=HOSTILE) for node in graph.nodes)
    path = save_page(replace(graph, nodes=named, text=HOSTILE), tmp_path / "g.html", "site/i.html")
    with open_browser() as browser, browser.page() as page:
        page.goto(path.as_uri())
        expect(page.locator("svg circle")).to_have_count(len(graph.nodes))
        expect(page.locator("svg path")).to_have_count(len(graph.weights))
        page.locator("[data-node='7.9@1']").click()
        expect(page.locator("svg path")).to_have_count(3)  # into it and out of it
        expect(page.locator("#side")).to_contain_text(HOSTILE)
        link = page.locator("#side a")
        assert link.get_attribute("href") == "site/i.html#mini-qwen3/w1k-l0-16/7/9"
        page.locator("#side input").fill("some words")
        page.locator("#group").click()
        assert page.evaluate("location.hash").startswith("#node=7.9%401&groups=some+words")
        page.reload()
        expect(page.locator(".chip")).to_contain_text("some words: 1")
        expect(page.locator("circle.chosen")).to_have_count(1)
        assert browser.complaints == []
        assert browser.outside == []
