"""A smaller graph: the nodes and edges through which most of the influence on the target goes.

The influence of a node is, over all ways to the target, the product of each edge's share of the
absolute sum of what goes into its node. It is what circuit-tracer prunes by.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen_scope_lens.errors import BadText
from qwen_scope_lens.graphs.graph import FeatureGraph

__all__ = ["influences", "prune"]


def influences(graph: FeatureGraph) -> tuple[np.ndarray, np.ndarray]:
    """The influence of every node and of every edge on the target. The target's own is 1.

    What a graph left out counts as a way that ends.
    """
    size = np.zeros(len(graph.nodes))
    np.add.at(size, graph.targets, np.abs(graph.weights))
    size += [abs(node.left_out or 0.0) for node in graph.nodes]
    shares = np.abs(graph.weights) / np.maximum(size[graph.targets], 1e-300)
    of_nodes, of_edges = np.zeros(len(graph.nodes)), np.zeros(len(shares))
    of_nodes[0] = 1.0
    # Nodes stand from the top down, so a layer is complete before its own edges are followed.
    layers = np.array([node.layer for node in graph.nodes])[graph.targets]
    for layer in sorted(set(layers.tolist()), reverse=True):
        at = np.flatnonzero(layers == layer)
        of_edges[at] = shares[at] * of_nodes[graph.targets[at]]
        np.add.at(of_nodes, graph.sources[at], of_edges[at])
    return of_nodes, of_edges


def prune(graph: FeatureGraph, nodes: float = 0.8, edges: float = 0.98) -> FeatureGraph:
    """Keep the most influential nodes, up to this share of all nodes' influence; edges alike.

    Afterwards every feature has a way to the target and something that goes into it, and errors
    and biases have a way. Embeddings and the target stay.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 < share <= 1:
            raise BadText(f"{name}={share}: expected a share above 0, up to 1")
    of_nodes, _ = influences(graph)
    kinds = np.array([node.kind for node in graph.nodes])
    ends = np.isin(kinds, ("embedding", "target"))
    inner = np.where(ends, 0.0, of_nodes)
    smaller = graph.kept(ends | _largest(inner, nodes), np.ones(len(graph.weights), dtype=bool))
    _, of_edges = influences(smaller)
    smaller = smaller.kept(np.ones(len(smaller.nodes), dtype=bool), _largest(of_edges, edges))
    while True:
        kinds = np.array([node.kind for node in smaller.nodes])
        out = np.bincount(smaller.sources, minlength=len(kinds)) > 0
        into = np.bincount(smaller.targets, minlength=len(kinds)) > 0
        stays = np.isin(kinds, ("embedding", "target")) | (out & (into | (kinds != "feature")))
        if stays.all():
            break
        smaller = smaller.kept(stays, np.ones(len(smaller.weights), dtype=bool))
    of_nodes, _ = influences(smaller)
    again = [
        replace(node, influence=float(share))
        for node, share in zip(smaller.nodes, of_nodes, strict=True)
    ]
    return replace(smaller, nodes=tuple(again))


def _largest(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest scores that make up a share of the sum. bool"""
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(scores[order])
    count = int(np.searchsorted(reached, share * reached[-1])) + 1 if len(scores) else 0
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order[:count]] = True
    return chosen & (scores > 0)
