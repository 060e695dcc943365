"""The paper's experiments with one rule: by layer, across languages, and with less data.

Each function returns plain rows, which `report.py`, the command line or a benchmark prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
from qwen_scope_lens.classify.feature_choice import rate_differences
from qwen_scope_lens.classify.methods import Documents
from qwen_scope_lens.classify.rules import f1_of
from qwen_scope_lens.classify.scores import Scores, scored
from qwen_scope_lens.errors import TooLittleData

__all__ = [
    "Efficiency",
    "LayerRow",
    "Overlap",
    "Transfer",
    "best_test_layer",
    "by_layer",
    "efficiency",
    "overlap",
    "overlap_pairs",
    "subset",
    "transfer",
]

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class LayerRow:
    """The rule of one layer."""

    layer: int
    d: float  # the largest firing-rate difference (equation 16)
    discovery: float  # F1 on the discovery documents
    test: Scores


@dataclass(frozen=True)
class Overlap:
    """Jaccard index of two languages' best features, over all pairs of languages."""

    layer: int
    mean: float
    low: float  # first quartile over pairs
    high: float  # third quartile


@dataclass(frozen=True)
class Transfer:
    """F1 of rules that were fitted on one language and used unchanged on another."""

    languages: tuple[str, ...]
    f1: np.ndarray  # [fitted on, tested on]
    layers: tuple[int, ...]  # the layer of each language's rule


@dataclass(frozen=True)
class Efficiency:
    """Results with a share of the discovery documents, over several random draws."""

    share: float
    n: int
    f1: float  # mean over draws
    low: float  # minimum over draws
    high: float  # maximum over draws
    of_full: float  # mean F1 over draws divided by the F1 with all documents


def by_layer(
    discovery: Documents, test: Documents, settings: Mapping[str, Any] | None = None
) -> list[LayerRow]:
    """Fit and score one rule per layer."""
    fitted = FeatureRuleClassifier.of_every_layer(discovery.pooled, discovery.truth, settings or {})
    return [
        LayerRow(
            layer,
            clf.layer_differences_[layer],
            scored(clf.predict(discovery.pooled), discovery.truth).f1,
            scored(clf.predict(test.pooled), test.truth),
        )
        for layer, clf in fitted.items()
    ]


def best_test_layer(rows: Sequence[LayerRow]) -> LayerRow:
    """The paper's "best layer", which is chosen on the test documents themselves."""
    return max(rows, key=lambda row: (row.test.f1, -row.layer))


def overlap(documents: Mapping[str, Documents], top: int = 10) -> list[Overlap]:
    """Jaccard index of the `top` features by firing-rate difference, for each layer."""
    if len(documents) < 2:
        raise TooLittleData(
            f"overlap needs two languages or more; found {', '.join(documents) or 'none'}"
        )
    found = []
    pairs = np.triu_indices(len(documents), 1)
    for layer, table in overlap_pairs(documents, top).items():
        low, high = np.quantile(table[pairs], [0.25, 0.75])
        found.append(Overlap(layer, float(table[pairs].mean()), float(low), float(high)))
    return found


def overlap_pairs(documents: Mapping[str, Documents], top: int = 10) -> dict[int, np.ndarray]:
    """The same for every pair of languages: `{layer: [languages, languages]}`, 1 on the diagonal.

    `{layer: ..}` in the order of the layers; a heat map of one is a figure of the paper.
    """
    first = next(iter(documents.values())).pooled
    found = {}
    for facts in first.source.layers:
        sets = []
        for part in documents.values():
            delta = rate_differences(part.pooled.layer(facts.layer), part.truth)
            sets.append(set(np.argsort(-delta, kind="stable")[:top].tolist()))
        found[facts.layer] = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    return found


def transfer(
    discovery: Mapping[str, Documents],
    test: Mapping[str, Documents],
    settings: Mapping[str, Any] | None = None,
) -> Transfer:
    """Fit one rule on each language's discovery documents; test it on every language's tests.

    Keys are languages; `settings` goes to `FeatureRuleClassifier`. Raises `TooLittleData` if a
    language has no test documents.
    """
    names = tuple(discovery)
    if missing := [name for name in names if name not in test]:
        raise TooLittleData(f"no test documents of {', '.join(missing)}")
    table = np.zeros((len(names), len(names)))
    layers = []
    for i, known in enumerate(names):
        clf = FeatureRuleClassifier(**(settings or {}))
        clf.fit(discovery[known].pooled, discovery[known].truth)
        assert clf.source_ is not None
        layers.append(clf.source_.layers[0].layer)
        for j, other in enumerate(names):
            says = clf.predict(test[other].pooled)
            table[i, j] = scored(says, test[other].truth).f1
    return Transfer(names, table, tuple(layers))


def efficiency(
    discovery: Documents,
    test: Documents,
    settings: Mapping[str, Any] | None = None,
    shares: Sequence[float] = FRACTIONS,
    draws: int = 5,
    seed: int = 0,
    best_layer: bool = False,
) -> list[Efficiency]:
    """F1 on test with smaller shares of the discovery data; both classes keep the same share.

    The layer is chosen on the reduced set, or on the test set with `best_layer`, as in the paper.
    """

    def reached(part: Documents) -> float:
        if best_layer:
            every = FeatureRuleClassifier.of_every_layer(part.pooled, part.truth, settings or {})
            return max(f1_of(clf.predict(test.pooled), test.truth) for clf in every.values())
        clf = FeatureRuleClassifier(**(settings or {})).fit(part.pooled, part.truth)
        return f1_of(clf.predict(test.pooled), test.truth)

    full = reached(discovery)
    found = []
    for share in shares:
        if share >= 1:
            found.append(Efficiency(1.0, len(discovery), full, full, full, 1.0))
            continue
        parts = [subset(discovery, share, seed + draw) for draw in range(draws)]
        values = [reached(part) for part in parts]
        found.append(
            Efficiency(
                share,
                len(parts[0]),
                float(np.mean(values)),
                min(values),
                max(values),
                float(np.mean(values)) / max(full, 1e-12),
            )
        )
    return found


def subset(documents: Documents, share: float, seed: int) -> Documents:
    """Draw that share of each class, but at least two documents, without replacement."""
    rng = np.random.default_rng(seed)
    rows = []
    for value in (True, False):
        [of_class] = np.nonzero(documents.truth == value)
        n = min(len(of_class), max(2, round(share * len(of_class))))
        rows.append(rng.choice(of_class, n, replace=False))
    return documents.take(np.sort(np.concatenate(rows)))
