"""The best partners of every row among all rows of another matrix, exactly, in bounded memory.

There are two kinds of score: the cosine of dense rows (decoder directions), and the correlation of
sparse columns (activations on the same tokens). Both are computed tile by tile, and only the best
entries per row and per column are kept. `compare/match.py` says what a score means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope_lens.features.best_entries import rank_within
from qwen_scope_lens.features.pool import canonical
from qwen_scope_lens.saes.exact.matmul import product

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Nearest", "nearest_by_correlation", "nearest_by_cosine"]

Array = np.ndarray[Any, Any]

TILE = 4096
"""Rows and columns of a tile: 67 MB of float32 scores."""


@dataclass(frozen=True)
class Nearest:
    """For every row of A its best rows of B, and the other way round; descending, -1 where none."""

    of_a: Array  # int64 [n_a, m]
    score_a: Array  # float32 [n_a, m]
    of_b: Array  # int64 [n_b, m]
    score_b: Array  # float32 [n_b, m]


def nearest_by_cosine(
    a: torch.Tensor,
    b: torch.Tensor,
    m: int = 8,
    tile: int = TILE,
    progress: Callable[[int], Any] | None = None,
) -> Nearest:
    """Compare rows of `a [n_a, d]` and `b [n_b, d]`; a row of zeros has cosine 0 with all others.

    Time grows with n_a n_b d, memory with tile^2 + (n_a + n_b) m. The matrices may be mapped files
    of any float dtype: one tile at a time becomes float32 of unit length.
    """
    of_a, score_a = _empty(len(a), m)
    of_b, score_b = _empty(len(b), m)
    for start in range(0, len(a), tile):
        rows = _unit(a[start : start + tile])
        for other in range(0, len(b), tile):
            scores = product(rows, _unit(b[other : other + tile]))
            _merge(of_a[start : start + tile], score_a[start : start + tile], scores, other)
            _merge(of_b[other : other + tile], score_b[other : other + tile], scores.T, start)
            if progress is not None:
                progress(scores.numel())
    return Nearest(*(x.numpy() for x in (of_a, score_a, of_b, score_b)))


def nearest_by_correlation(
    a: csr_matrix, b: csr_matrix, m: int = 8, tile: int = 256, least: int = 5
) -> Nearest:
    """Pearson's correlation of the columns of `a [n, d_a]` and `b [n, d_b]`, sparse and >= 0.

    Columns that fire together on fewer than `least` rows have no score, because on a few tokens a
    perfect correlation is chance. Only pairs that fire together are computed: all others correlate
    negatively.
    """
    n = a.shape[0]
    left, mean_a, norm_a = _standard(a)
    right, mean_b, norm_b = _standard(b)
    fires_b = right.copy()
    fires_b.data = np.ones_like(fires_b.data)
    of_a, score_a = _empty(a.shape[1], m)
    of_b, score_b = _empty(b.shape[1], m)
    for start in range(0, a.shape[1], tile):
        columns = left[:, start : start + tile].T.tocsr()
        together = (columns @ right).tocoo()
        ones = columns.copy()
        ones.data = np.ones_like(ones.data)
        count = (ones @ fires_b).tocoo()  # the same pattern, in the same order
        row, column = together.row + start, together.col
        with np.errstate(divide="ignore", invalid="ignore"):
            score = (together.data - n * mean_a[row] * mean_b[column]) / (
                norm_a[row] * norm_b[column]
            )
        good = (count.data >= least) & (score > 0)
        row, column, score = row[good], column[good], score[good].astype(np.float32)
        _merge_pairs(of_a, score_a, row, column, score)
        _merge_pairs(of_b, score_b, column, row, score)
    return Nearest(*(x.numpy() for x in (of_a, score_a, of_b, score_b)))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.detach().float(), dim=-1)


def _empty(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n, m), -1, dtype=torch.int64), torch.full((n, m), -torch.inf)


def _merge(best: torch.Tensor, score: torch.Tensor, tile: torch.Tensor, offset: int) -> None:
    """Put the best of a tile `[rows, columns]` into `best [rows, m]`, in place."""
    m = best.shape[1]
    value, index = tile.topk(min(m, tile.shape[1]), dim=1)
    both = torch.cat([score, value], dim=1)
    names = torch.cat([best, index + offset], dim=1)
    value, at = both.topk(m, dim=1)
    score.copy_(value)
    best.copy_(names.gather(1, at))


def _merge_pairs(
    best: torch.Tensor, score: torch.Tensor, row: Array, column: Array, value: Array
) -> None:
    """Put scattered pairs into `best` and `score`, in place."""
    m = best.shape[1]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    rank = rank_within(row)
    top = rank < m
    touched, at = np.unique(row[top], return_inverse=True)
    new = torch.full((len(touched), m), -torch.inf)
    names = torch.full((len(touched), m), -1, dtype=torch.int64)
    where = (torch.from_numpy(at), torch.from_numpy(rank[top]))
    new[where] = torch.from_numpy(value[top])
    names[where] = torch.from_numpy(column[top].astype(np.int64))
    rows = torch.from_numpy(touched)
    both = torch.cat([score[rows], new], dim=1)
    value_of, chosen = both.topk(m, dim=1)
    score[rows] = value_of
    best[rows] = torch.cat([best[rows], names], dim=1).gather(1, chosen)


def _standard(x: csr_matrix) -> tuple[Any, Array, Array]:
    """The matrix in float64 by columns, their means, and the lengths of the centred columns."""
    columns = canonical(x).astype(np.float64).tocsc()
    n = columns.shape[0]
    mean = np.asarray(columns.mean(0)).ravel()
    squares = columns.copy()
    squares.data **= 2
    norm = np.sqrt(np.maximum(np.asarray(squares.sum(0)).ravel() - n * mean**2, 0))
    return columns, mean, norm
