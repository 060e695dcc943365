"""Self-contained report pages: headings, tables and pictures in one HTML file.

No script, no outside request, light and dark; every text is escaped, so nothing from a corpus can
run. What a report says is its own room's business; the feature site is made in `dashboards`.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadText
from qwen_scope_lens.files import whole_file

__all__ = ["Link", "Page", "chart", "save_chart", "table_html"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --mark: #4a7ebb33; }
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left;
  vertical-align: top; unicode-bidi: isolate; }
td.number, th.number { text-align: right; }
p.quiet, figcaption, footer { color: var(--quiet); font-size: .85rem; }
figure { margin: 1rem 0; overflow-x: auto; } .wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; } code, pre { font-size: .88em; } pre { overflow-x: auto; }
@media print { body { max-width: none; } h2 { break-after: avoid; }
  figure { break-inside: avoid; } }
""".strip()


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads somewhere: a file beside the page, or a web address."""

    text: str
    target: str

    def __post_init__(self) -> None:
        scheme, colon, _ = self.target.partition(":")
        if colon and scheme.lower() not in ("http", "https"):
            raise BadText(f"{self.target!r} is no link: expected a relative path or https://")


class Page:
    """One report, filled from the top and written whole by `save`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> Page:
        return self._add(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, quiet: bool = False) -> Page:
        """A paragraph."""
        return self._add(f"<p{' class=quiet' if quiet else ''}>{html.escape(text)}</p>")

    def verbatim(self, text: str) -> Page:
        return self._add(f'<pre dir="auto">{html.escape(text)}</pre>')

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Page:
        """Numbers stand to the right; floats are shown to three places, None as a dash."""
        return self._add(table_html(columns, rows))

    def figure(self, svg: str, caption: str = "") -> Page:
        """A picture made by `chart`."""
        return self._add(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def render(self) -> str:
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
            " style-src 'unsafe-inline'\">\n"
            f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

    def save(self, path: Path) -> Path:
        with whole_file(path) as partial:
            partial.write_text(self.render(), encoding="utf-8")
        return path

    def _add(self, part: str) -> Page:
        self._parts.append(part)
        return self


def table_html(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as HTML, every text escaped."""
    body = [[(_shown(cell), isinstance(cell, (int, float))) for cell in row] for row in rows]
    right = [
        bool(body) and all(row[i][1] or row[i][0] == "–" for row in body)
        for i in range(len(columns))
    ]
    kinds = [' class="number"' if number else ' dir="auto"' for number in right]
    head = "".join(
        f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True)
    )
    lines = (
        "".join(f"<td{kind}>{cell}</td>" for kind, (cell, _) in zip(kinds, row, strict=True))
        for row in body
    )
    inside = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{inside}\n</tbody></table></div>"
    )


def chart(draw: Callable[[Any], None], width: float = 7.0, height: float = 3.6) -> str:
    """What `draw(axes)` draws with matplotlib, as SVG that reads on light and dark ground."""
    return _drawn(draw, width, height).getvalue().decode("utf-8").split("?>", 1)[-1].strip()


def save_chart(
    draw: Callable[[Any], None], path: Path, width: float = 7.0, height: float = 3.6
) -> Path:
    """The same as a file: a picture for the documentation."""
    with whole_file(path) as partial:
        partial.write_bytes(_drawn(draw, width, height).getvalue())
    return path


def _drawn(draw: Callable[[Any], None], width: float, height: float) -> io.BytesIO:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "qsl",  # with no date below: the same numbers give the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(grey, "#808080"),
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        out = io.BytesIO()
        # Text stays text, so the reader's fonts count and not those of this machine.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out


def _shown(cell: Any) -> str:
    """A cell as HTML."""
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.target)}">{html.escape(cell.text)}</a>'
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.3f}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return html.escape(str(cell))
