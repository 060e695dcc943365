"""Edges against finite differences: a little more and a little less of the source, nothing else.

This shares no gradient with `attribution.py`: the model runs on, from the changed residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import BadText
from qwen_scope_lens.graphs.attribution import open_saes
from qwen_scope_lens.graphs.edges import Level, Target, decompose
from qwen_scope_lens.graphs.frozen import EMBEDDINGS, Frozen, frozen
from qwen_scope_lens.graphs.graph import FeatureGraph, Node
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.tables import Table

__all__ = ["agreement"]


def agreement(
    model: Model,
    graph: FeatureGraph,
    *,
    each: int = 2,
    step: float = 1e-4,
    saes: Mapping[int, LayerSAE] | None = None,
    sae_folder: str | Path | None = None,
) -> Table:
    """Compare the strongest edges of each kind and layer with central differences.

    `each` edges per kind of source and layer; each source is scaled by 1 + `step` and 1 - `step`.
    The table has the largest relative difference per kind. In float64 it is about `step` squared;
    in float32 the model's rounding is larger than such a change, so take a `step` of 0.05 or so.
    """
    if graph.steps != 1:
        raise BadText("the edges are integrated gradients, which are no derivative at one point")
    sae_of = open_saes(find_group(graph.group), sae_folder, None, saes)
    found: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad(), frozen(model, graph.token_ids, graph.layers, graph.hold) as one:
        for layer in (EMBEDDINGS, *graph.layers):
            level = decompose(one, layer, None if layer == EMBEDDINGS else sae_of(layer))
            above = min((n for n in graph.layers if n > layer), default=None)
            sae = None if above is None else sae_of(above)
            for edge in _strongest(graph, layer, each):
                source, target = (
                    graph.nodes[side[edge]] for side in (graph.sources, graph.targets)
                )
                change = step * _contribution(level, source)
                rows = torch.stack([level.x + change, level.x - change]).to(level.x.dtype)
                more, less = _value(one, layer, above, rows, target, sae, graph)
                slope = float(more - less) / (2 * step)
                weight = float(graph.weights[edge])
                kind = (source.kind, target.kind)
                found.setdefault(kind, []).append(abs(slope - weight) / abs(weight))
    return Table.of(
        ("from", "into", "edges", "largest relative difference"),
        [(*kind, len(all_), max(all_)) for kind, all_ in sorted(found.items())],
        formats={"largest relative difference": ".1e"},
    )


def _strongest(graph: FeatureGraph, layer: int, each: int) -> list[int]:
    """The strongest edges out of a layer, of each kind of source and target."""
    chosen: dict[tuple[str, str], list[int]] = {}
    for edge in np.argsort(-np.abs(graph.weights), kind="stable").tolist():
        source, target = graph.nodes[graph.sources[edge]], graph.nodes[graph.targets[edge]]
        if source.layer == layer:
            some = chosen.setdefault((source.kind, target.kind), [])
            if len(some) < each:
                some.append(edge)
    return [edge for some in chosen.values() for edge in some]


def _contribution(level: Level, source: Node) -> Tensor:
    """What a node writes into the residual. `[T, d_model]`"""
    out = torch.zeros_like(level.error)
    if source.kind == "bias":
        return out + level.bias
    assert source.position is not None
    at = source.position
    if source.kind == "feature":
        assert level.sae is not None
        assert source.number is not None
        entry = (level.indices[at] == source.number) & (level.values[at] > 0)
        out[at] = level.values[at][entry] * level.sae.direction(source.number).to(out)
    else:
        out[at] = level.error[at]
    return out


def _value(
    one: Frozen,
    layer: int,
    above: int | None,
    rows: Tensor,
    target: Node,
    sae: LayerSAE | None,
    graph: FeatureGraph,
) -> Tensor:
    """The target's pre-activation, or its logits, for each row of residuals. `[rows]`"""
    out = one.run(layer, above, rows)
    if sae is None:
        minus = graph.target_ids[1] if len(graph.target_ids) == 2 else None
        return Target(graph.target_ids[0], minus, "").value(out)
    assert target.number is not None
    return out[:, target.position or 0] @ sae.encoder_row(target.number).to(out)
