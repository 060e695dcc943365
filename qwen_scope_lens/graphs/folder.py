"""What `qsl graph --out` writes: the page, the graph, its test, and the export for other viewers.

index.html               the pruned graph, to click through
graph.json               the whole graph, for `FeatureGraph.load`
faithfulness.json        the curves of ablations of the pruned graph
circuit-tracer/*.json    the pruned graph for circuit-tracer and Neuronpedia
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_scope_lens.files import refuse_other_folder, whole_folder, write_json
from qwen_scope_lens.graphs.export import write_circuit_tracer
from qwen_scope_lens.graphs.faithfulness import Faithfulness
from qwen_scope_lens.graphs.graph import FeatureGraph
from qwen_scope_lens.graphs.page import save_page

__all__ = ["save_folder"]

GRAPH, PAGE, TEST, VIEWER = "graph.json", "index.html", "faithfulness.json", "circuit-tracer"


def save_folder(
    out: Path,
    whole: FeatureGraph,
    pruned: FeatureGraph,
    tests: Sequence[Faithfulness] = (),
    pages: str | None = None,
) -> Path:
    """Write all of it, whole or not at all, also over an older graph. Returns the page's path."""
    refuse_other_folder(out, "a graph", GRAPH)
    with whole_folder(out) as folder:
        whole.save(folder / GRAPH)
        save_page(pruned, folder / PAGE, pages, [str(test.table()) for test in tests])
        write_circuit_tracer(pruned, folder / VIEWER)
        if tests:
            curves: dict[str, Any] = {test.ablation: test.table().records() for test in tests}
            write_json(folder / TEST, "qsl-graph-test", 1, curves)
    return out / PAGE
