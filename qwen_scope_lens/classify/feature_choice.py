"""Which features tell the classes apart: firing rates, their difference, layers by their best.

The paper's equations 13, 14, 16 and 17 on a CSR matrix of document maxima. What is then decided
with the features is `rules.py`.
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
    """The columns taken, and what they were taken for."""

    columns: np.ndarray  # [m]
    differences: np.ndarray  # Δ of each, [m]
    layers: tuple[int, ...]  # positions of the layers they come from
    best_by_layer: np.ndarray  # d of every layer offered, [layers]


def rate_differences(
    maxima: csr_matrix, positive: np.ndarray, threshold: float = 0.0
) -> np.ndarray:
    """Δ (equation 14): the share of positive documents on which a feature fires anywhere, less
    that of the others. `[n_docs, n_features] -> [n_features]`"""
    fires = canonical(maxima).copy()
    fires.data = (fires.data > threshold).astype(np.float64)
    yes, no = positive.astype(np.float64), (~positive).astype(np.float64)
    # Over one denominator, in whole numbers: features with equal differences tie exactly.
    whole = fires.T @ yes * no.sum() - fires.T @ no * yes.sum()
    return np.asarray(whole / (yes.sum() * no.sum())).ravel()


def best_layers(differences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """d (equation 16): the largest Δ of every layer. `[layers]`"""
    return np.array([differences[a:b].max() for a, b in pairwise(offsets)])


def top_features(
    differences: np.ndarray,
    offsets: np.ndarray,
    top_k: int,
    among: Sequence[int],
    n_layers: int = 1,
    either_sign: bool = False,
) -> Choice:
    """The `top_k` features of the `n_layers` layers with the largest d, among those allowed.

    Equation 16 is `n_layers=1`; equation 17 is `top_k=1` with several layers. Ties go to the lower
    layer and the lower feature. A feature whose Δ is not positive is left out, unless it is the
    best that there is. With `either_sign` features of the other class count as much (|Δ|), for
    rules that can use them.
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
