"""Self-contained report pages: headings, tables and pictures in one HTML file.

A page has no script and makes no outside request; it suits a light and a dark screen. Every text is
escaped, so nothing from a corpus can run. What a report says is decided in the room that makes it;
the site of all features is made in `site`.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadText
from qwen_scope_lens.files import whole_file

__all__ = [
    "Link",
    "Page",
    "Shaded",
    "chart",
    "lines_html",
    "printable",
    "save_chart",
    "shaded_html",
    "table_html",
]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #63605a; --link: #1f57a4; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa69d; --link: #8ab4f0; } }
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
a { color: var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left;
  vertical-align: top; unicode-bidi: isolate; overflow-wrap: break-word; }
th { vertical-align: bottom; }
td.number, th.number { text-align: right; } .whole { white-space: nowrap; }
td.long { min-width: 15rem; }
p.quiet, figcaption, footer { color: var(--quiet); font-size: .85rem; }
figure { margin: 1rem 0; overflow-x: auto; color: var(--quiet); }
/* A shadow at an edge says that the table goes on there. */
.wide { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to right, Canvas 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, Canvas 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, #8887, transparent) left / .5rem 100% no-repeat scroll,
  linear-gradient(to left, #8887, transparent) right / .5rem 100% no-repeat scroll; }
svg { max-width: 100%; height: auto; } code, pre { font-size: .88em; } pre { overflow-x: auto; }
@media (max-width: 640px) { body { margin: 1rem auto; } h1 { font-size: 1.35rem; }
  th, td { padding: .25rem .5rem; } }
@media print { body { max-width: none; } h2 { break-after: avoid; } .wide { background: none; }
  figure { break-inside: avoid; } }
""".strip()


WHOLE = re.compile(r"[!-~]{1,48}|[\d\s.,%±()\[\]–-]{1,32}")
"""Cells that are not broken into lines: one word, such as an address; a number and its interval."""

LONG = 60
"""A cell of more characters is a text, and its column is not squeezed."""

GREY = "#808080"
"""Text and axes of charts. A page shows them in the colour of its captions."""


@dataclass(frozen=True)
class Link:
    """A cell of a table that links to a file beside the page or to a web address."""

    text: str
    target: str

    def __post_init__(self) -> None:
        scheme, colon, _ = self.target.partition(":")
        if colon and scheme.lower() not in ("http", "https"):
            raise BadText(
                f"{self.target!r} cannot be a link here: expected a relative path or https://"
            )


@dataclass(frozen=True)
class Shaded:
    """A piece of a text on a background as strong as `share` (0 to 1). None: it is not counted, and
    shown in grey. `hint` appears where the pointer rests."""

    text: str
    share: float | None
    hint: str = ""


class Page:
    """One report. Add its parts from the top down, then write the file with `save`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> Page:
        """Add a heading."""
        return self._add(f"<h2>{_safe(text)}</h2>")

    def text(self, text: str, quiet: bool = False) -> Page:
        """Add a paragraph."""
        return self._add(f"<p{' class=quiet' if quiet else ''}>{_safe(text)}</p>")

    def verbatim(self, text: str) -> Page:
        """Add a text with its line breaks and spaces as they are."""
        return self._add(f'<pre dir="auto">{_safe(text)}</pre>')

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        formats: Mapping[str, str] | None = None,
        heat: Sequence[str] = (),
    ) -> Page:
        """Add a table: numbers to the right, floats with three decimals, None as a dash."""
        return self._add(table_html(columns, rows, formats, heat))

    def shaded(self, rows: Iterable[tuple[str, Sequence[Shaded]]]) -> Page:
        """Add texts whose pieces are shaded, each with a name before it."""
        return self._add(shaded_html(rows))

    def figure(self, svg: str, caption: str = "") -> Page:
        """Add a picture made by `chart`."""
        return self._add(f"<figure>{svg}<figcaption>{_safe(caption)}</figcaption></figure>")

    def render(self) -> str:
        """The page as HTML."""
        title = _safe(self.title)
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
        """Write the page as one file and return its path."""
        with whole_file(path) as partial:
            partial.write_text(self.render(), encoding="utf-8")
        return path

    def _add(self, part: str) -> Page:
        self._parts.append(part)
        return self


_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u202a-\u202e\u2066-\u2069"  # which turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # line breaks, and halves of characters
)


def printable(text: object, keep: str = "") -> str:
    """Text for a terminal or a page. Characters that would command a terminal, or turn the
    direction of what follows, are written out, such as `\\x1b`.

    Those in `keep` stay, such as tab and newline in a text of several lines.
    """
    return _COMMANDS.sub(
        lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text)
    )


def _safe(text: str) -> str:
    """A text as HTML that shows nothing but this text. Lines and tabs stay."""
    return html.escape(printable(text, keep="\t\n"))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def table_html(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    formats: Mapping[str, str] | None = None,
    heat: Sequence[str] = (),
) -> str:
    """A table as HTML, with every text escaped.

    `formats` are those of the floats of some columns. The numbers of the columns `heat` are shaded,
    all on one scale from 0 to the largest of them.
    """
    how = [(formats or {}).get(name, "") for name in columns]
    body = [list(row) for row in rows]
    right = [
        bool(body)
        and all(row[i] in (None, "–") or isinstance(row[i], (int, float)) for row in body)
        for i in range(len(columns))
    ]
    hot = [name in heat for name in columns]
    found = [cell for row in body for cell, is_hot in zip(row, hot, strict=True) if is_hot and cell]
    most = max((cell for cell in found if math.isfinite(cell)), default=0.0)
    kinds = [' class="number"' if number else ' dir="auto"' for number in right]
    head = "".join(
        f"<th{kind}>{_safe(name)}</th>" for kind, name in zip(kinds, columns, strict=True)
    )

    def cell_html(cell: Any, i: int) -> str:
        style = _shade(cell / most) if hot[i] and most and cell is not None else ""
        shown = _shown(cell, how[i])
        breaks = _breaks(shown) if kinds[i].startswith(" dir") else ""
        return f"<td{kinds[i]}{breaks}{style}>{shown}</td>"

    lines = ("".join(cell_html(cell, i) for i, cell in enumerate(row)) for row in body)
    inside = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{inside}\n</tbody></table></div>"
    )


def lines_html(lines: Sequence[str]) -> str:
    """Lines of text as they are, aligned columns included; nothing for no line."""
    text = "\n".join(lines).strip("\n")
    return f"<pre>{_safe(text)}</pre>" if text else ""


def shaded_html(rows: Iterable[tuple[str, Sequence[Shaded]]]) -> str:
    """A heat map of texts: under each name a text whose pieces are shaded."""
    parts = []
    for name, pieces in rows:
        spans = "".join(
            f'<span{_shade(piece.share)} title="{_safe(piece.hint)}">'
            + _safe(piece.text).replace("\n", "↵\n")  # a line break can be seen, too
            + "</span>"
            for piece in pieces
        )
        parts.append(
            f"<div dir='auto' style='unicode-bidi:isolate;opacity:.75'>{_safe(name)}</div>"
            "<div dir='auto' style='unicode-bidi:isolate;white-space:pre-wrap;margin:0 0 .7em'>"
            f"{spans}</div>"
        )
    return "".join(parts)


def _shade(share: float | None) -> str:
    """The style of a background that suits light and dark screens."""
    if share is None:
        return ' style="opacity:.45"'
    strength = 0.75 * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    return f' style="background:rgba(240,130,30,{strength:.2f})"' if strength else ""


def chart(draw: Callable[[Any], None], width: float = 7.0, height: float = 3.6) -> str:
    """What `draw(axes)` draws with matplotlib, as SVG for light and dark backgrounds."""
    text = _drawn(draw, width, height).getvalue().decode("utf-8").split("?>", 1)[-1].strip()
    return text.replace(GREY, "currentColor")


def save_chart(
    draw: Callable[[Any], None], path: Path, width: float = 7.0, height: float = 3.6
) -> Path:
    """Save the picture that `chart` makes as a file, for the documentation."""
    with whole_file(path) as partial:
        partial.write_bytes(_drawn(draw, width, height).getvalue())
    return path


def _drawn(draw: Callable[[Any], None], width: float, height: float) -> io.BytesIO:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {
        "svg.fonttype": "none",
        # A fixed salt here and no date below: the same numbers give the same file.
        "svg.hashsalt": "qsl",
        "font.size": 11,  # legible where a phone shows the picture at half its size
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(grey, GREY),
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        for artist in figure.findobj():  # such as a colour bar: a page may not load a bitmap
            artist.set_rasterized(False)
        out = io.BytesIO()
        # Text stays text in the SVG: the reader's fonts are used, so a font missing here is fine.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out


def _breaks(cell: str) -> str:
    """The class of a cell of text, by how it may be broken into lines."""
    text = html.unescape(re.sub("<[^>]*>", "", cell))
    kind = "whole" if WHOLE.fullmatch(text) else "long" if len(text) > LONG else ""
    return f' class="{kind}"' if kind else ""


def _shown(cell: Any, how: str = "") -> str:
    """A cell as HTML."""
    if isinstance(cell, Link):
        return f'<a href="{_safe(cell.target)}">{_safe(cell.text)}</a>'
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return format(cell, how or (",.3f" if cell == 0 or abs(cell) >= 0.001 else ".3g"))
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    text = str(cell)
    return _safe(text if text.strip() else text.encode("unicode_escape").decode())
