"""`llms.txt` and `AGENTS.md` say what their sources say, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_scope_lens.cli.verbs import VERBS
from tools.docs.agents import FILES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", FILES)
def test_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == FILES[name](), f"run `make agents`: {name} is old"


@pytest.mark.parametrize("name", FILES)
def test_links_exist_and_every_verb_is_there(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert len(links) > 1
    for link in links:
        assert (ROOT / link).exists(), f"{name} links to {link}"
    for verb in VERBS:
        assert f"`qsl {verb}`" in text


def test_the_index_has_every_page_and_notebook() -> None:
    text = (ROOT / "llms.txt").read_text("utf-8")
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.ipynb")):
        assert f"]({path.relative_to(ROOT).as_posix()})" in text
