"""The documentation site: what is made of the code, and that no error or page is left out."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import qwen_scope_lens as qsl
from qwen_scope_lens import errors
from tools.site.reference import api_pages, commands_page, sizes_page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_named_error_has_its_entry() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(set(errors.__all__) - {"ScopeError", "CheckpointError"})
    assert text.count("*When:*") == len(entries)


def test_every_page_is_in_the_navigation() -> None:
    nav = re.search(r"^nav:\n(.*)\Z", (ROOT / "mkdocs.yml").read_text("utf-8"), re.S | re.M)
    assert nav is not None
    pages = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(nav[0]))))
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in pages if not page.startswith("reference/")} == written


def test_generated_pages_hold_what_the_code_has() -> None:
    pages = api_pages()
    assert "::: qwen_scope_lens.features.rank.rank" in pages["features"]
    assert "::: qwen_scope_lens.address.FeatureRef" in pages["index"]
    for name in ("rank", "Plan", "load_sae"):
        assert f"| `{name}` |" in pages["index"]
    commands = commands_page()
    assert "### qsl rank" in commands
    assert '"qsl label merge"' in commands
    sizes = sizes_page()
    for group in qsl.GROUPS:
        assert (f"`{group.short}`" in sizes) == (group.origin != "mini")
