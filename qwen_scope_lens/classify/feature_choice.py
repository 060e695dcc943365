"""Choose the features that separate the classes, by the difference of their firing rates.

This implements the paper's equations 13, 14, 16 and 17 on a CSR matrix of document maxima.
`rules.py` then makes decisions with the chosen features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qwen_scope_lens.features.pool import canonical

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Choice", "best_layers", "rate_differences", "top_features"]


@dataclass(frozen=True)
class Choice:
    """The chosen columns, with the figures by which they were chosen."""

    columns: np.ndarray  # [m]
    differences: np.ndarray  # Δ of each column, [m]
    layers: tuple[int, ...]  # positions of the layers that they belong to
    best_by_layer: np.ndarray  # d of every layer, [layers]


def rate_differences(
    maxima: csr_matrix, positive: np.ndarray, threshold: float = 0.0
) -> np.ndarray:
    """Δ (equation 14) of every feature. `[n_docs, n_features] -> [n_features]`

    It is the share of positive documents on which the feature fires anywhere, minus the share of
    the other documents.
    """
    fires = canonical(maxima).copy()
    fires.data = (fires.data > threshold).astype(np.float64)
    yes, no = positive.astype(np.float64), (~positive).astype(np.float64)
    # Whole numbers over a common denominator, so that equal differences tie exactly.
    whole = fires.T @ yes * no.sum() - fires.T @ no * yes.sum()
    return np.asarray(whole / (yes.sum() * no.sum())).ravel()


def best_layers(differences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """d (equation 16): the largest Δ of each layer. `-> [layers]`"""
    return np.array([differences[a:b].max() for a, b in pairwise(offsets)])


def top_features(
    differences: np.ndarray,
    offsets: np.ndarray,
    top_k: int,
    among: Sequence[int],
    n_layers: int = 1,
    either_sign: bool = False,
) -> Choice:
    """The `top_k` features of each of the `n_layers` layers in `among` with the largest d.

    Equation 16 is `n_layers=1`; equation 17 is `top_k=1` with several layers. Ties go to the lower
    layer and the lower feature. A feature whose Δ is not positive is left out, unless no feature
    has a positive Δ; then the best one is taken. With `either_sign` features are ranked by |Δ|, for
    rules that can also use features of the negative class.
    """
    best = best_layers(differences, offsets)
    order = sorted(among, key=lambda at: (-best[at], at))[:n_layers]
    columns: list[int] = []
    for at in order:
        part = differences[offsets[at] : offsets[at + 1]]
        part = np.abs(part) if either_sign else part
        ranked = np.argsort(-part, kind="stable")[:top_k]
        columns += [int(offsets[at] + f) for f in ranked if part[f] > 0]
    if not columns:
        at = order[0]
        columns = [int(offsets[at] + differences[offsets[at] : offsets[at + 1]].argmax())]
    taken = np.array(columns)
    return Choice(taken, differences[taken], tuple(order), best)
