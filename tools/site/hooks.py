"""What MkDocs asks us while it builds the site (`hooks` in mkdocs.yml).

The pages in docs/ are written for people who read them in the repository, too. Here a link that
leaves docs/ is settled, generated pages are added, and the navigation gets the API's pages. A link
to a file that does not exist fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from tools.site.reference import api_pages, commands_page, sizes_page

ROOT = Path(__file__).parent.parent.parent
API = "reference/api"

OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)\s]*)?\)")
"""A Markdown link that goes up, out of the folder of its page."""

RESULTS = ROOT / "benchmarks" / "results"
"""Outputs of benchmarks, which the pages quote: they become part of the site."""

LIVE = ROOT / "build" / "live"
"""What `tools.site.live` made for the home page: `make site` makes it, a check need not."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of the code."""
    pages = {f"{API}/{name}.md": text for name, text in api_pages().items()}
    pages["reference/commands.md"] = commands_page()
    pages["reference/sizes.md"] = sizes_page()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for output in sorted(RESULTS.glob("*.txt")):
        files.append(File.generated(config, f"results/{output.name}", abs_src_path=str(output)))
    for part in sorted(path for path in LIVE.rglob("*") if path.is_file()):
        place = f"live/{part.relative_to(LIVE).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(part)))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page per door under "API" in the navigation."""
    doors = [f"{API}/{name}.md" for name in api_pages() if name != "index"]
    for section in config.nav or []:
        for part in section.get("Reference", []) if isinstance(section, dict) else []:
            if isinstance(part, dict) and "API" in part:
                part["API"] = [part["API"], *doors]
    return config


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Settle links out of docs/: to a result, the home page, or a file of the repository."""
    here = ROOT / "docs" / Path(page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found[1], (here / found[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {found[2]} does not exist")
        up = "../" * page.file.src_uri.count("/")
        if target.parent == RESULTS and target.suffix == ".txt":
            return f"[{text}]({up}results/{target.name})"
        if target == ROOT / "README.md":
            return f"[{text}]({up}index.md)"
        place = target.relative_to(ROOT).as_posix()
        return text if place in text else f"{text} (`{place}`)"

    return OUTSIDE.sub(link, markdown)
