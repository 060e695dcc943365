"""Two groups of documents, every feature at once: differences, effect sizes, AUROC and a test.

Works on a pooled matrix (`pool.py`), one row per document, one column per feature, and never makes
it dense: the zeros of a column are one block of ties. The test is Mann and Whitney's U, two-sided.
What a normal approximation calls unlikely is computed again with the exact distribution of how many
firing documents are positive (`exact_tail.py`). q-values are Benjamini and Hochberg's, or
Yekutieli's, which need no assumption about how features depend on each other. Which documents are
compared is `document_sets.py`, what makes a finding believable `controls.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.exact_tail import scores_of, upper_tail
from qwen_scope_lens.features.pool import canonical

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Contrast", "Correction", "RankSums", "contrast", "q_values"]

LIKELY = 0.1
"""A p-value of the normal approximation from which it stays as it is."""
Correction = Literal["bh", "by"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Contrast:
    """What tells positive from negative documents; every array is `[d_sae]`."""

    n_positive: int
    n_negative: int
    documents: Ints  # of both groups, on which the feature fires
    mean_positive: Floats
    mean_negative: Floats
    rate_positive: Floats  # the share of documents on which it fires
    rate_negative: Floats
    effect: Floats  # Cohen's d; infinite where both groups are constant and differ
    auroc: Floats
    p_value: Floats

    @property
    def mean_difference(self) -> Floats:
        return self.mean_positive - self.mean_negative

    @property
    def rate_difference(self) -> Floats:
        return self.rate_positive - self.rate_negative


def contrast(pooled: csr_matrix | RankSums, positive: Bools) -> Contrast:
    """Compare the rows where `positive` holds with all others. `[n, d_sae]`, `[n]`"""
    labels = np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    if min(n_positive, n_negative) < 2:
        raise TooLittleData(
            f"{n_positive} positive and {n_negative} negative documents: both groups need at least"
            " 2 to be compared, and some dozens to find anything"
        )
    sums = pooled if isinstance(pooled, RankSums) else RankSums(pooled)
    x = sums.pooled
    chosen = labels.astype(np.float64)
    squares = x.copy()
    squares.data **= 2
    fires = x.copy()
    fires.data[:] = 1.0
    total, total_squares, documents = (np.asarray(m.sum(0)).ravel() for m in (x, squares, fires))
    inside, inside_squares, inside_fires = (m.T @ chosen for m in (x, squares, fires))
    mean_positive = inside / n_positive
    mean_negative = (total - inside) / n_negative
    spread = np.maximum(inside_squares - n_positive * mean_positive**2, 0) + np.maximum(
        total_squares - inside_squares - n_negative * mean_negative**2, 0
    )
    # What float64 leaves of the squares of a constant column is no spread.
    spread[spread <= 1e-12 * total_squares] = 0
    deviation = np.sqrt(spread / (n_positive + n_negative - 2))
    difference = mean_positive - mean_negative
    difference = np.where(np.abs(difference) <= 1e-12 * (mean_positive + mean_negative), 0.0,
                          difference)  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(difference == 0, 0.0, difference / deviation)
    auroc, p_value = sums.test(labels)
    return Contrast(
        n_positive=n_positive,
        n_negative=n_negative,
        documents=documents.astype(np.int64),
        mean_positive=mean_positive,
        mean_negative=mean_negative,
        rate_positive=inside_fires / n_positive,
        rate_negative=(documents - inside_fires) / n_negative,
        effect=effect,
        auroc=auroc,
        p_value=p_value,
    )


class RankSums:
    """The ranks of every column, made once and summed for as many labellings as wanted."""

    def __init__(self, pooled: csr_matrix) -> None:
        self.pooled = canonical(pooled).astype(np.float64).tocsc()
        if self.pooled.nnz and self.pooled.data.min() < 0:
            raise ValueError("activations are never negative")
        n, self._size = pooled.shape[0], pooled.shape[1]
        counts = np.diff(self.pooled.indptr)
        column = np.repeat(np.arange(self._size), counts)
        zeros = n - counts
        self._zero_rank = (zeros + 1) / 2
        order = np.lexsort((self.pooled.data, column))
        values, column = self.pooled.data[order], column[order]
        new = np.ones(len(values), dtype=bool)
        new[1:] = (column[1:] != column[:-1]) | (values[1:] != values[:-1])
        starts = np.flatnonzero(new)
        sizes = np.diff(np.append(starts, len(values)))
        # Mean rank of each group of ties within its column, zeros ranked below all of them.
        within = starts - self.pooled.indptr[column[starts]]
        rank = zeros[column[starts]] + within + (sizes + 1) / 2
        self._above_zero = self.pooled.copy()
        # The zeros of a column share a rank, and only what lies above it is stored.
        self._above_zero.data[order] = np.repeat(rank, sizes) - self._zero_rank[column]
        ties = np.bincount(
            column[starts], weights=sizes.astype(np.float64) ** 3 - sizes, minlength=self._size
        )
        self._ties = ties + zeros.astype(np.float64) ** 3 - zeros
        self._scores = scores_of(self._above_zero.data[order], self.pooled.indptr)

    def test(self, labels: Bools) -> tuple[Floats, Floats]:
        """AUROC and p-value of every column: `[n] -> [d_sae]`, `[n, m] -> [d_sae, m]`.

        Two-sided: twice the smaller tail. From LIKELY on p is that of the normal approximation with
        correction for ties and continuity, which is quicker and good there.
        """
        from scipy.special import ndtr

        chosen = np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
        n = len(chosen)
        n_positive = chosen.sum(0)
        n_negative = n - n_positive
        sums = self._above_zero.T @ chosen
        ranks = sums + np.multiply.outer(self._zero_rank, n_positive)
        u = ranks - n_positive * (n_positive + 1) / 2
        pairs = n_positive * n_negative
        variance = pairs / 12 * ((n + 1) - self._ties[:, None] / (n * (n - 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (np.abs(u - pairs / 2) - 0.5) / np.sqrt(np.maximum(variance, 0))
        p = np.where(variance > 1e-9 * pairs, np.minimum(1.0, 2 * ndtr(-np.maximum(z, 0))), 1.0)
        features, runs = np.nonzero(p < LIKELY)
        p[features, runs] = self._tails(
            sums[features, runs], (u > pairs / 2)[features, runs], features, n,
            n_positive[runs].astype(np.int64),
        )  # fmt: skip
        shape = (self._size, *np.shape(labels)[1:])
        return (u / pairs).reshape(shape), p.reshape(shape)

    def _tails(self, sums: Floats, high: Bools, features: Ints, n: int, n_positive: Ints) -> Floats:
        """Twice the tail that a sum over the positive documents lies in."""
        scores = self._scores.take(features)
        whole = scores.mean * scores.documents
        # A low sum over the positives is a high one over the negatives.
        far = np.where(high, sums, whole - sums)
        return np.minimum(
            1.0, 2 * upper_tail(far, scores, n, np.where(high, n_positive, n - n_positive))
        )

    @cached_property
    def documents(self) -> Ints:
        """On how many documents each feature fires."""
        return np.diff(self.pooled.indptr).astype(np.int64)


def q_values(p: Floats, tested: Bools, correction: Correction = "bh") -> Floats:
    """False-discovery rates over the tested features; 1 for the others. `[..] -> [..]`"""
    from scipy.stats import false_discovery_control

    q = np.ones_like(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested], method=correction)
    return q
