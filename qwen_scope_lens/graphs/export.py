"""The JSON that the viewers of circuit-tracer and of Neuronpedia read.

The shape is that of circuit-tracer's `frontend.graph_models`: metadata, qParams, nodes, links. Its
nodes are transcoder features; ours are features of the residual stream, under the same type name,
because viewers draw by it. Biases have no type there and are left out. A node's `influence` is
cumulative there: the share of all influence that it and the more influential nodes have, so that a
viewer's slider, up to `node_threshold`, keeps the strongest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.graphs.graph import FeatureGraph, Node
from qwen_scope_lens.version import __version__

__all__ = ["circuit_tracer", "write_circuit_tracer"]

_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "target": "logit",
}


def circuit_tracer(graph: FeatureGraph, slug: str = "graph") -> dict[str, Any]:
    """The graph in that shape. `slug` is the name under which a viewer lists it."""
    names = [_name(graph, node) for node in graph.nodes]
    there = [node.kind in _TYPES for node in graph.nodes]
    shares = _cumulative(
        [node if shown else None for node, shown in zip(graph.nodes, there, strict=True)]
    )
    return {
        "metadata": {
            "slug": slug,
            "scan": graph.group,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.text,
            "node_threshold": 1.0,
            "schema_version": 1,
            "info": {"generator": {"name": "qwen-scope-lens", "version": __version__}},
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            _node(graph, node, name, share)
            for node, name, share, shown in zip(graph.nodes, names, shares, there, strict=True)
            if shown
        ],
        "links": [
            {"source": names[source], "target": names[target], "weight": weight}
            for source, target, weight in zip(
                graph.sources.tolist(), graph.targets.tolist(), graph.weights.tolist(), strict=True
            )
            if there[source] and there[target]
        ],
    }


def write_circuit_tracer(graph: FeatureGraph, folder: Path) -> Path:
    """`<slug>.json`, and `graph-metadata.json`, in which circuit-tracer's server looks for it."""
    slug = re.sub(r"[^a-z0-9]+", "-", graph.text.lower())[:60].strip("-") or "graph"
    content = circuit_tracer(graph, slug)
    for name, part in ((slug, content), ("graph-metadata", {"graphs": [content["metadata"]]})):
        with whole_file(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(part, ensure_ascii=False, allow_nan=False), "utf-8")
    return folder / f"{slug}.json"


def _name(graph: FeatureGraph, node: Node) -> str:
    if node.kind == "feature":
        return f"{node.layer}_{node.number}_{node.position}"
    if node.kind == "embedding":
        return f"E_{node.number}_{node.position}"
    if node.kind == "target":
        return f"{graph.n_layers + 1}_{node.number}_{node.position}"
    return f"{node.layer}_{node.kind}_{node.position}"  # "0_LAYER_POSITION" there, as some features


def _cumulative(nodes: Sequence[Node | None]) -> list[float | None]:
    """The share of all influence down to each node, by influence; None for the target, and for
    nodes that are not shown (None)."""
    known = [(i, node.influence) for i, node in enumerate(nodes) if node and node.kind != "target"]
    counted, values = [i for i, _ in known], np.array([value for _, value in known])
    order = np.argsort(-values, kind="stable")
    total = float(values.sum())
    found: list[float | None] = [None] * len(nodes)
    for i, share in zip(order.tolist(), values[order].cumsum().tolist(), strict=True):
        found[counted[i]] = min(1.0, share / total) if total else 1.0
    return found


def _node(graph: FeatureGraph, node: Node, name: str, share: float | None) -> dict[str, Any]:
    ends = {"embedding": "E", "target": str(graph.n_layers + 1)}
    layer = ends.get(node.kind, str(node.layer))
    where = {"embedding": node.position, "target": node.position}.get(node.kind, 0)
    number = node.number or 0
    clerp = node.label
    if node.kind == "target":
        # A viewer reads the number between "(p=" and ")".
        clerp = f"{graph.target} (p={graph.probability:.3f})"
    elif node.kind == "embedding":
        clerp = f"Emb: {graph.tokens[node.position or 0]}"
    return {
        "node_id": name,
        "feature": {
            "feature": _paired(node.layer, number),
            "error": -1,
            "embedding": node.position,
            "target": number,
        }[node.kind],
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": graph.probability if node.kind == "target" else 0.0,
        "is_target_logit": node.kind == "target",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if node.kind == 'target' else layer}_{_of(node)}-{where}",
        "clerp": clerp,
        "influence": share,
        "activation": node.value if node.kind == "feature" else None,
    }


def _of(node: Node) -> int | None:
    return node.position if node.kind == "error" else node.number


def _paired(layer: int, feature: int) -> int:
    """Cantor's pairing: one whole number for layer and feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
