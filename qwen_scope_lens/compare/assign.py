"""One-to-one: the assignment of A's features to B's with the largest total score.

Scipy's sparse matching does the work, on the best candidates of either side. A pair is worth what
its score exceeds the null's level by, so that a feature without a real partner stays alone instead
of taking somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qwen_scope_lens.features.nearest import Nearest

__all__ = ["assign", "crowded"]

Array = np.ndarray[Any, Any]


def assign(nearest: Nearest, level: float) -> tuple[Array, Array]:
    """`(partner [n_a], score [n_a])`; partner -1 where it stays alone.

    Candidates are the best of every feature of either side. The result is the optimum over all
    pairs when no feature has more candidates above `level` than were kept (`crowded` counts them).
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_a, n_b = len(nearest.of_a), len(nearest.of_b)
    a, b, score = candidates(nearest, level)
    partner = np.full(n_a, -1, dtype=np.int64)
    found = np.zeros(n_a, dtype=np.float32)
    if not len(a):
        return partner, found
    # Only rows with a candidate; each may also stay alone, at its own extra column.
    rows, at = np.unique(a, return_inverse=True)
    alone = np.arange(len(rows))
    cost = coo_matrix(
        (
            np.concatenate([2.0 - (score - level), np.full(len(rows), 2.0)]),
            (np.concatenate([at, alone]), np.concatenate([b, n_b + alone])),
        ),
        shape=(len(rows), n_b + len(rows)),
    ).tocsr()
    row, column = min_weight_full_bipartite_matching(cost)
    real = column < n_b
    partner[rows[row[real]]] = column[real]
    lookup = dict(zip(zip(a.tolist(), b.tolist(), strict=True), score.tolist(), strict=True))
    for i in np.flatnonzero(partner >= 0).tolist():
        found[i] = lookup[i, int(partner[i])]
    return partner, found


def candidates(nearest: Nearest, level: float) -> tuple[Array, Array, Array]:
    """Pairs of either side's best above the level, once each: a, b, score."""
    n_b = len(nearest.of_b)
    rows = np.repeat(np.arange(len(nearest.of_a)), nearest.of_a.shape[1])
    columns = np.repeat(np.arange(n_b), nearest.of_b.shape[1])
    a = np.concatenate([rows, nearest.of_b.ravel()])
    b = np.concatenate([nearest.of_a.ravel(), columns])
    score = np.concatenate([nearest.score_a.ravel(), nearest.score_b.ravel()])
    good = (a >= 0) & (b >= 0) & (score > level)
    a, b, score = a[good], b[good], score[good].astype(np.float64)
    _, once = np.unique(a * n_b + b, return_index=True)
    return a[once], b[once], score[once]


def crowded(nearest: Nearest, level: float) -> int:
    """Features with more candidates above the level than were kept, on either side."""
    return int((nearest.score_a[:, -1] > level).sum() + (nearest.score_b[:, -1] > level).sum())
