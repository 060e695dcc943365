"""A feature graph: nodes, weighted edges, what is known of both. Plain data, as JSON and table.

A feature node is one feature at one token. An *error* node is what an SAE leaves out of the
residual at a token, *bias* is its `b_dec`, and embeddings and the target are the two ends. An edge
says how much of the target node's pre-activation (or of the chosen logit) comes from the source
node, all else as it is. Edges go from one SAE layer to the next only: an effect that skips a
layer's features goes through its error nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile, ScopeError
from qwen_scope_lens.features.reading import Labels
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.plan_for import plan_for
from qwen_scope_lens.tables import Table, View, shown

__all__ = ["KINDS", "FeatureGraph", "Node"]

FORMAT, VERSION = "qsl-graph", 1
MADE_BY = "qsl graph TEXT --out FOLDER"

Kind = Literal["feature", "error", "bias", "embedding", "target"]
KINDS: tuple[Kind, ...] = ("feature", "error", "bias", "embedding", "target")


@dataclass(frozen=True)
class Node:
    """One node. `linear` to `removed` are of nodes that have incoming edges, else None.

    `linear` is the sum that all incoming edges must have: the gradient times the whole residual
    below. `left_out` is the sum of the incoming edges that the graph does not keep, `gap` the
    difference between the sum of all of them and `linear`, as a share of their absolute sum. What
    `value` has beyond `linear` does not come from below: biases, and where the layers in between
    are not linear. `features` is the sum of the edges from features, and `removed` how much the
    node really loses when all of them are gone at once: where the two differ, the node is not
    linear in them, and integrated gradients (`steps`) follow it better.
    """

    kind: Kind
    layer: int  # -1 for embeddings; the number of the model's layers for the target
    position: int | None  # the token; None for a bias, which is the same at every token
    number: int | None  # of a feature, or the token's id
    value: float  # activation, length of an error or of an embedding, value of the target
    influence: float  # share of the target that comes this way, counted in absolute values
    linear: float | None = None
    left_out: float | None = None
    gap: float | None = None
    features: float | None = None
    removed: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """A name of its own in the graph, such as `6.213@4` for a feature at token 4."""
        middle = str(self.number) if self.kind == "feature" else self.kind
        at = "" if self.position is None else f"@{self.position}"
        return f"{self.layer}.{middle}{at}" if self.kind != "target" else "target"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureGraph(View):
    """Why a model goes on as it does after a text. `attribute` makes one, `prune` a smaller one."""

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    model: str
    n_layers: int  # of the model
    group: str
    layers: tuple[int, ...]  # the SAEs'
    target: str  # in words
    target_ids: tuple[int, ...]  # one token, or two whose logits are subtracted
    probability: float  # of the (first) target token
    likely: tuple[tuple[str, float], ...]  # the most probable next tokens
    hold: tuple[str, ...]
    steps: int  # of integrated gradients; 1 is the plain gradient
    nodes: tuple[Node, ...]  # the target first, then from the top layer down
    sources: np.ndarray  # [edges], places in `nodes`
    targets: np.ndarray  # [edges]
    weights: np.ndarray  # [edges], float64

    def ref(self, node: Node) -> FeatureRef:
        """The address of a feature node."""
        if node.kind != "feature" or node.number is None:
            raise BadFile(f"{node.name} is not a feature")
        return FeatureRef(self.group, node.layer, node.number)

    @cached_property
    def features(self) -> tuple[Node, ...]:
        """The feature nodes, the most influential first."""
        found = [node for node in self.nodes if node.kind == "feature"]
        return tuple(sorted(found, key=lambda node: -node.influence))

    @property
    def completeness(self) -> float:
        """The largest `gap` of any node: rounding, if all is well."""
        return max(node.gap for node in self.nodes if node.gap is not None)

    @property
    def misfit(self) -> float | None:
        """How far edges are from what happens when the features below a node are all removed.

        The median over nodes of |features - removed| / |removed|.
        """
        found = [
            abs(node.features - node.removed) / abs(node.removed)
            for node in self.nodes
            if node.features is not None and node.removed
        ]
        return float(np.median(found)) if found else None

    @property
    def error_share(self) -> float:
        """The share of the influence at the graph's ends that enters through error nodes.

        The other ends are embeddings and biases.
        """
        ends = [node for node in self.nodes if node.kind in ("error", "bias", "embedding")]
        total = sum(node.influence for node in ends)
        errors = sum(node.influence for node in ends if node.kind == "error")
        return errors / total if total else 0.0

    def incoming(self, node: int) -> list[tuple[int, float]]:
        """Sources and weights of the edges into `nodes[node]`, the strongest first."""
        at = np.flatnonzero(self.targets == node)
        order = at[np.argsort(-np.abs(self.weights[at]), kind="stable")]
        return [(int(self.sources[i]), float(self.weights[i])) for i in order]

    def labelled(self, labels: Labels) -> FeatureGraph:
        """The same graph with the words for each feature."""
        named = [
            replace(node, label=labels.text(self.ref(node))) if node.kind == "feature" else node
            for node in self.nodes
        ]
        return replace(self, nodes=tuple(named))

    def plan(self, names: Iterable[str], op: str, strength: float | None = None) -> Plan:
        """The features of some nodes as a plan for `steer`, such as `plan(["6.213@4"], "ablate")`.

        Each edit acts at every token, since a plan names features and not places. A feature that
        is there at several tokens is one edit.
        """
        known = {node.name: node for node in self.nodes if node.kind == "feature"}
        refs = []
        for name in names:
            if name not in known:
                few = ", ".join(node.name for node in self.features[:3])
                raise BadFile(f"{name!r:.60} is not a feature node of this graph, such as {few}")
            refs.append(self.ref(known[name]))
        return plan_for(refs, op, strength)

    def table(self, most: int | None = None) -> Table:
        """The feature nodes by influence, with the token and what is known of each."""
        nodes = self.features if most is None else self.features[:most]
        rows = [
            (
                node.name,
                str(self.ref(node)),
                self.tokens[node.position or 0],
                node.value,
                node.influence,
                node.label,
            )
            for node in nodes
        ]
        columns = ("node", "feature", "token", "activation", "influence", "label")
        labelled = any(row[-1] for row in rows)
        return Table.of(
            columns if labelled else columns[:-1],
            rows if labelled else [row[:-1] for row in rows],
            above=self.said(),
            more=len(self.features) - len(nodes),
            formats={"activation": ".4g", "influence": ".3f"},
            heat=("influence",),
        )

    def said(self) -> tuple[str, ...]:
        """What the graph is of and how far it can be believed, in a few lines."""
        likely = ", ".join(f"{token!r} {share:.0%}" for token, share in self.likely)
        end = self.nodes[0]
        linear = 0.0 if end.linear is None else end.linear
        kinds = {kind: sum(node.kind == kind for node in self.nodes) for kind in KINDS}
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        how = (
            "plain gradients" if self.steps == 1 else f"{self.steps} steps of integrated gradients"
        )
        return (
            f"{self.text!r} on {self.model}: likely next {likely}",
            f"target {self.target} = {end.value:.4g}; {linear:.4g} of it through the edges",
            f"{len(self.nodes)} nodes ({counted}), {len(self.weights)} edges; {how}, held:"
            f" {', '.join(self.hold) or 'nothing'}",
            f"edges sum to their node's linearisation within {self.completeness:.1e};"
            f" {self.error_share:.0%} of the influence enters through SAE errors",
            "removing all features below a node changes it otherwise than the edges say by"
            f" {shown(self.misfit, '.0%')} (median over nodes)",
        )

    def kept(self, nodes: np.ndarray, edges: np.ndarray) -> FeatureGraph:
        """The part of the graph with these nodes and edges (bool masks).

        What goes is added to `left_out` of the nodes that it went into.
        """
        edges = edges & nodes[self.sources] & nodes[self.targets]
        lost = np.zeros(len(self.nodes))
        np.add.at(lost, self.targets[~edges], self.weights[~edges])
        place = np.cumsum(nodes) - 1
        some = [
            node if node.left_out is None else replace(node, left_out=node.left_out + float(gone))
            for node, gone, stays in zip(self.nodes, lost, nodes, strict=True)
            if stays
        ]
        return replace(
            self,
            nodes=tuple(some),
            sources=place[self.sources[edges]],
            targets=place[self.targets[edges]],
            weights=self.weights[edges],
        )

    def save(self, path: str | Path) -> None:
        content = {name: getattr(self, name) for name in _PLAIN}
        content["nodes"] = [asdict(node) for node in self.nodes]
        edges = zip(
            self.sources.tolist(), self.targets.tolist(), self.weights.tolist(), strict=True
        )
        write_json(Path(path), FORMAT, VERSION, content | {"edges": list(edges)})

    @classmethod
    def load(cls, path: str | Path) -> FeatureGraph:
        """Read what `save` wrote."""
        content = read_json(Path(path), FORMAT, VERSION, MADE_BY)
        try:
            edges = np.array(content.pop("edges"), dtype=np.float64).reshape(-1, 3)
            nodes = tuple(Node(**row) for row in content.pop("nodes"))
            content["likely"] = tuple((str(t), float(p)) for t, p in content["likely"])
            plain = {name: _tuple(content.pop(name)) for name in _PLAIN}
            places = edges[:, :2].astype(np.int64)
            if content or (places < 0).any() or (places >= len(nodes)).any():
                raise ValueError(f"unknown parts ({', '.join(content)}), or edges without nodes")
            return cls(
                **plain,
                nodes=nodes,
                sources=places[:, 0],
                targets=places[:, 1],
                weights=edges[:, 2],
            )
        except (KeyError, TypeError, ValueError, ScopeError) as error:
            raise BadFile(
                f"{path} is damaged ({error!r:.200}): make it again with {MADE_BY}"
            ) from error


_PLAIN = (
    *("text", "tokens", "token_ids", "model", "n_layers", "group", "layers", "target"),
    *("target_ids", "probability", "likely", "hold", "steps"),
)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
