"""One order from several: the places of features in each column of evidence, weighted and summed.

Every column orders all features of all layers. A feature's score is the weighted sum, over the
columns, of `1 / (10 + place)` (reciprocal rank fusion, Cormack et al. 2009), times 11: a feature
that is first in every column has the sum of the weights. So no column has to be measured in the
units of another, and a feature that one column alone puts first still comes up. A feature without
evidence in a column gets nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.concepts.concept import Column

__all__ = ["SOFTENED", "WEIGHTS", "by_place", "combined", "weights_of"]

Floats = np.ndarray[Any, np.dtype[np.float32]]

WEIGHTS: dict[Column, float] = {
    "examples": 3.0,
    "labels": 2.0,
    "meaning": 2.0,
    "words": 1.0,
    "says": 1.0,
}
"""Examples show what is meant, labels were written about the feature; words and the logit lens are
hints. `labels` and `meaning` read the same labels, so together they have the weight of one."""
SOFTENED = 10
"""How many places matter: the tenth gets half as much as the first."""


def by_place(scores: Mapping[FeatureRef, float], refs: Sequence[LayerRef]) -> Floats:
    """Scores of labels, in the order of all features of the layers."""
    size = refs[0].row.d_sae
    place = {ref: number * size for number, ref in enumerate(refs)}
    found = np.zeros(len(refs) * size, dtype=np.float32)
    for ref, score in scores.items():
        if ref.sae in place:
            found[place[ref.sae] + ref.feature] = score
    return found


def weights_of(columns: Iterable[Column]) -> dict[Column, float]:
    chosen = tuple(columns)
    both = {"labels", "meaning"} <= set(chosen)
    halved = ("labels", "meaning") if both else ()
    return {column: WEIGHTS[column] / (2 if column in halved else 1) for column in chosen}


def combined(
    columns: dict[Column, Floats],
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """The score of every feature, and its place in every column (from 1; 0 without evidence)."""
    score = np.zeros(len(next(iter(columns.values()))))
    places, weights = {}, weights_of(columns)
    for column, values in columns.items():
        place = np.zeros(len(values), dtype=np.int64)
        positive = np.flatnonzero(values > 0)
        order = positive[np.argsort(-values[positive], kind="stable")]
        place[order] = np.arange(1, len(order) + 1)
        score[order] += weights[column] * (SOFTENED + 1) / (SOFTENED + place[order])
        places[str(column)] = place
    return score, places
