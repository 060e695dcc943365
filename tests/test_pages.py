"""Report pages and files that say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_scope_lens.errors import BadFile, MissingExtra
from qwen_scope_lens.extras import require
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.pages import Link, Page, chart, save_chart

HOSTILE = "<script>alert(1)</script>"


def test_nothing_from_a_corpus_can_run() -> None:
    page = Page(HOSTILE).heading(HOSTILE).text(HOSTILE).verbatim(HOSTILE)
    page.table([HOSTILE, "n"], [[HOSTILE, 1.5], ["b", None]]).figure("<svg/>", HOSTILE)
    text = page.render()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 8  # the title stands twice
    assert "1.500" in text
    assert "–" in text


def test_a_link_is_escaped_and_leads_nowhere_dangerous() -> None:
    page = Page("t").table(["where"], [[Link('a"b<', "site/1.html?a=1&b=2")]]).render()
    assert '<a href="site/1.html?a=1&amp;b=2">a&quot;b&lt;</a>' in page
    for target in ("javascript:alert(1)", "data:text/html,x", "JavaScript:x"):
        with pytest.raises(ValueError, match="cannot be a link"):
            Link("x", target)


def test_a_chart_is_an_svg_and_the_same_each_time(tmp_path: Path) -> None:
    def draw(axes: object) -> None:
        axes.plot([0, 1], [2, 3], label="语言")  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    first = chart(draw)
    assert first.startswith(("<!DOCTYPE svg", "<svg"))
    assert "语言" in first
    assert first == chart(draw)
    assert save_chart(draw, tmp_path / "a.svg").read_text("utf-8").startswith("<?xml")


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    path = Page("a").text("b").save(tmp_path / "deep" / "page.html")
    assert path.read_text("utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_json_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "qsl-plan", 2, {"edits": ["é"]})
    assert read_json(path, "qsl-plan", 2, "qsl steer") == {"edits": ["é"]}
    with pytest.raises(BadFile, match=r"not a qsl-rule file.*'qsl-plan'.*qsl classify fit"):
        read_json(path, "qsl-rule", 1, "qsl classify fit")
    with pytest.raises(BadFile, match="version 2, this package reads version 3"):
        read_json(path, "qsl-plan", 3, "qsl steer")
    with pytest.raises(BadFile, match="does not exist"):
        read_json(tmp_path / "b.json", "qsl-plan", 2, "qsl steer")
    for damaged in ('{"format": "qsl-plan"', "[1]", "\xff", "[" * 100_000):
        path.write_text(damaged, "latin-1")
        with pytest.raises(BadFile):
            read_json(path, "qsl-plan", 2, "qsl steer")


def test_a_missing_extra_names_the_way_out() -> None:
    with pytest.raises(MissingExtra, match=r"qwen-scope-lens\[nothing\]"):
        require("a_module_that_is_not_there", "nothing")
