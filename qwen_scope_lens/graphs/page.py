"""A graph as one HTML file: layers upwards, tokens across, and the facts of a node beside it.

The file makes no outside request. Its one script is named by its hash in the page's security
policy, and the graph is JSON in which no `<` is left, so no text of a corpus or label can run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.graphs.graph import FeatureGraph
from qwen_scope_lens.graphs.pruning import influences
from qwen_scope_lens.pages import Link

__all__ = ["graph_page", "save_page"]

DIGITS = 5
NAMES = ("kind", "name", "label", "layer", "position", "number")
NUMBERS = ("value", "influence", "linear", "left_out", "features", "removed")


def graph_page(graph: FeatureGraph, pages: str | None = None, notes: Sequence[str] = ()) -> str:
    """The page. `pages` is the address of the site of these features (`qsl dash build`), relative
    to the page or with https://, to which features then link. `notes` stand under the graph."""
    if pages is not None:
        pages = Link("", pages).target  # raises for what cannot be a link
    _, of_edges = influences(graph)
    ends = zip(graph.sources.tolist(), graph.targets.tolist(), strict=True)
    edges = [
        [*end, _short(weight), _short(influence)]
        for end, weight, influence in zip(
            ends, graph.weights.tolist(), of_edges.tolist(), strict=True
        )
    ]
    nodes = []
    for node in graph.nodes:
        numbers = {name: getattr(node, name) for name in NUMBERS}
        shown = {name: None if x is None else _short(x) for name, x in numbers.items()}
        nodes.append({name: getattr(node, name) for name in NAMES} | shown)
    content = {
        "tokens": graph.tokens,
        "group": graph.group,
        "target": graph.target,
        "n_layers": graph.n_layers,
        "said": graph.said(),
        "pages": pages,
        "nodes": nodes,
        "edges": edges,
    }
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    folder = resources.files("qwen_scope_lens.graphs") / "viewer"
    style, script = ((folder / f"graph.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = html.escape(f"{graph.text} → {graph.target}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<style>{style}</style></head><body>
<header><h1 dir="auto">{title}</h1>
<p class="tools"><label>edges shown <input id="edges" type="number" min="0" step="50"></label>
<span>click a node for what goes into it; the address keeps the view</span></p></header>
<main><div class="card board" id="board"></div><div class="card side" id="side"></div></main>
{"".join(f"<pre class='card' dir='auto'>{html.escape(note)}</pre>" for note in notes)}
<noscript><p>This page draws its graph with a script of its own: it needs JavaScript, and no
network.</p></noscript>
<script type="application/json" id="graph">{data}</script>
<script>{script}</script>
</body></html>
"""


def save_page(
    graph: FeatureGraph, path: Path, pages: str | None = None, notes: Sequence[str] = ()
) -> Path:
    """Write the page as one file and return its path."""
    with whole_file(path) as partial:
        partial.write_text(graph_page(graph, pages, notes), encoding="utf-8")
    return path


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
