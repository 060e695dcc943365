"""Rules over a few features: how each kind is learned from values, and how it decides.

A `Rule` consists of plain numbers (thresholds, weights or a small tree) and has a `score` whose
sign is the decision. It does not depend on stores, models or scikit-learn. `feature_choice.py`
selects its features.

The paper's rule is `or_rule` at threshold 0 (equations 13 and 15). The other rules are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadFile

__all__ = ["RULES", "Node", "Rule", "f1_of"]

MOST_CUTS = 64
"""How many thresholds are tried per feature: quantiles of its values on positive documents."""


@dataclass(frozen=True)
class Node:
    """A node of a small tree: a leaf (`feature` -1) or a question `value > threshold`."""

    feature: int  # position among the rule's features
    threshold: float
    low: int  # the node for `value <= threshold`
    high: int
    share: float  # of positive documents among the discovery documents that reach the node


@dataclass(frozen=True)
class Rule:
    """A fitted rule over m feature values."""

    kind: str
    thresholds: tuple[float, ...] = ()  # or, k-of-n, thresholds: a feature fires above its own
    at_least: int = 1  # how many features have to fire
    weights: tuple[float, ...] = ()  # logistic
    intercept: float = 0.0
    nodes: tuple[Node, ...] = ()  # tree

    def score(self, values: np.ndarray) -> np.ndarray:
        """The score of each document; it is positive exactly if the rule says yes. `[n, m] -> [n]`

        For a logistic rule the score is the log odds; for a tree, the share of positives minus one
        half. For the other rules, which need `at_least` features to fire, it is the excess of a
        value over its threshold: that of the feature with the `at_least`-th largest excess.
        """
        values = np.asarray(values, dtype=np.float64)
        if self.kind == "logistic":
            return values @ np.array(self.weights, dtype=np.float64) + self.intercept
        if self.kind == "tree":
            return self._leaf_shares(values) - 0.5
        above = values - np.array(self.thresholds)
        if not above.shape[1]:
            return np.full(len(values), -np.inf)
        return np.sort(above, axis=1)[:, -self.at_least]

    def responsible(self, values: np.ndarray) -> np.ndarray:
        """Positions of the features behind the score of one document `[m]`, the strongest first."""
        values = np.asarray(values, dtype=np.float64)
        if self.kind == "logistic":
            weight = np.abs(values * np.array(self.weights))
        elif self.kind == "tree":
            asked = self._path(values)
            weight = np.array([float(i in asked) for i in range(len(values))])
        else:
            weight = values - np.array(self.thresholds)
        order = np.argsort(-weight, kind="stable")
        return order[weight[order] > 0]

    def needed(self) -> np.ndarray:
        """Positions of the features that can change a decision."""
        if self.kind == "logistic":
            return np.nonzero(np.array(self.weights))[0]
        if self.kind == "tree":
            return np.unique([node.feature for node in self.nodes if node.feature >= 0]).astype(int)
        return np.nonzero(np.isfinite(self.thresholds))[0]

    def take(self, positions: np.ndarray) -> Rule:
        """The same rule over some of its features; the others must not be `needed`."""
        place = {int(old): new for new, old in enumerate(positions)}
        return Rule(
            self.kind,
            tuple(self.thresholds[i] for i in positions) if self.thresholds else (),
            self.at_least,
            tuple(self.weights[i] for i in positions) if self.weights else (),
            self.intercept,
            tuple(
                Node(place.get(n.feature, -1), n.threshold, n.low, n.high, n.share)
                for n in self.nodes
            ),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Rule:
        if content.get("kind") not in RULES:
            raise BadFile(f"a rule of kind {content.get('kind')!r}: expected {', '.join(RULES)}")
        return cls(
            str(content["kind"]),
            tuple(map(float, content["thresholds"])),
            int(content["at_least"]),
            tuple(map(float, content["weights"])),
            float(content["intercept"]),
            tuple(Node(**node) for node in content["nodes"]),
        )

    def _leaf_shares(self, values: np.ndarray) -> np.ndarray:
        at = np.zeros(len(values), dtype=int)
        feature = np.array([node.feature for node in self.nodes])
        threshold = np.array([node.threshold for node in self.nodes])
        low = np.array([node.low for node in self.nodes])
        high = np.array([node.high for node in self.nodes])
        for _ in self.nodes:  # a path is at most as long as the number of nodes
            inner = feature[at] >= 0
            if not inner.any():
                break
            rows, nodes = np.nonzero(inner)[0], at[inner]
            goes_up = values[rows, feature[nodes]] > threshold[nodes]
            at[inner] = np.where(goes_up, high[nodes], low[nodes])
        return np.array([node.share for node in self.nodes])[at]

    def _path(self, values: np.ndarray) -> set[int]:
        at, asked = 0, set()
        while (node := self.nodes[at]).feature >= 0:
            if values[node.feature] > 0:
                asked.add(node.feature)
            at = node.high if values[node.feature] > node.threshold else node.low
        return asked


def f1_of(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F1 of the positive class; 0 if nothing is predicted or true."""
    hits = float((predicted & truth).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + truth.sum()))


def or_rule(values: np.ndarray, truth: np.ndarray, settings: Mapping[str, Any]) -> Rule:
    """Equation 15: yes if any feature fires on any token."""
    return Rule("or", (float(settings["threshold"]),) * values.shape[1])


def k_of_n(values: np.ndarray, truth: np.ndarray, settings: Mapping[str, Any]) -> Rule:
    """Yes if at least k features fire; k is `at_least`, by default the best on discovery."""
    n, threshold = values.shape[1], float(settings["threshold"])
    count = (values > threshold).sum(1)
    at_least = settings["at_least"]
    if at_least is None:
        scores = [f1_of(count >= k, truth) for k in range(1, n + 1)]
        at_least = 1 + int(np.argmax(scores))
    return Rule("k-of-n", (threshold,) * n, int(at_least))


def own_thresholds(values: np.ndarray, truth: np.ndarray, settings: Mapping[str, Any]) -> Rule:
    """An OR in which each feature in turn gets the threshold that is best for the F1 of the union.

    A feature that would only cost precision gets an infinite threshold, so that more features
    cannot lower the F1 on the discovery set.
    """
    least = float(settings["threshold"])
    union = np.zeros(len(values), dtype=bool)
    thresholds = []
    for column in values.T:
        best, chosen = f1_of(union, truth), float("inf")
        fired = column[truth & (column > least)]
        cuts = np.quantile(fired, np.linspace(0, 1, MOST_CUTS)) if len(fired) else fired
        for cut in (least, *np.unique(cuts)):
            score = f1_of(union | (column > cut), truth)
            if score > best + 1e-12:
                best, chosen = score, float(cut)
        union |= column > chosen
        thresholds.append(chosen)
    return Rule("thresholds", tuple(thresholds))


def logistic(values: np.ndarray, truth: np.ndarray, settings: Mapping[str, Any]) -> Rule:
    """scikit-learn's logistic regression with an L1 penalty, on values divided by their maximum."""
    from sklearn.linear_model import LogisticRegression

    scale = np.abs(values).max(0)
    scale[scale == 0] = 1
    model = LogisticRegression(
        l1_ratio=1.0,
        solver="liblinear",
        C=float(settings["C"]),
        class_weight="balanced",
        random_state=settings["random_state"],
        max_iter=500,
    )
    model.fit(values / scale, truth)
    return Rule(
        "logistic",
        weights=tuple((model.coef_[0] / scale).tolist()),
        intercept=float(model.intercept_[0]),
    )


def tree(values: np.ndarray, truth: np.ndarray, settings: Mapping[str, Any]) -> Rule:
    """scikit-learn's decision tree with at most `max_depth` levels."""
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(
        max_depth=int(settings["max_depth"]),
        min_samples_leaf=max(1, len(values) // 200),
        random_state=settings["random_state"],
    )
    # scikit-learn's tree compares in float32.
    grown = model.fit(values.astype(np.float32), truth).tree_
    share = grown.value[:, 0, -1] / grown.value[:, 0].sum(-1)
    nodes = tuple(
        Node(
            int(grown.feature[i]) if grown.children_left[i] >= 0 else -1,
            float(grown.threshold[i]),
            int(grown.children_left[i]),
            int(grown.children_right[i]),
            float(share[i]),
        )
        for i in range(grown.node_count)
    )
    return Rule("tree", nodes=nodes)


Learn = Callable[[np.ndarray, np.ndarray, Mapping[str, Any]], Rule]

RULES: dict[str, Learn] = {
    "or": or_rule,
    "k-of-n": k_of_n,
    "thresholds": own_thresholds,
    "logistic": logistic,
    "tree": tree,
}
"""Kind -> the function that learns it from values `[n, m]` and the truth `[n]`."""
