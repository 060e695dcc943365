"""Two groups of documents, every feature at once: differences, effect sizes, AUROC and a test.

Works on a pooled matrix (`pool.py`) with one row per document and one column per feature, and never
makes it dense: the zeros of a column are one block of ties. The test is Mann and Whitney's U,
two-sided. Where its normal approximation says that a value is unlikely, the p-value is computed
again with the exact distribution of how many firing documents are positive (`upper_tail`). q-values
are Benjamini and Hochberg's, or Benjamini and Yekutieli's, which need no assumption about how
features depend on each other. `document_sets.py` chooses the documents, and `controls.py` says what
chance alone would give.

Why the normal approximation is not enough: it says nothing about the far tail of a rank sum whose
values are mostly zeros. A feature that fires on 3 of 2,000 documents, two of them among 48 positive
ones, is to be expected among 65,536 features, but a normal distribution makes it one in a million.
So the sum over the positive documents is taken apart. How many of the firing documents are positive
is exact (hypergeometric). Only the order of the firing documents among themselves is approximated:
by a normal distribution (without ties its tails are longer than the true ones) or, where ties skew
it, by a gamma distribution of the same skewness. Where all values are equal, the result is Fisher's
exact test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import gammaincc, gammaln, ndtr

from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.pool import canonical

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Contrast", "Correction", "RankSums", "contrast", "q_values"]

LIKELY = 0.1
"""From this p-value on, the one of the normal approximation is kept."""
CELLS = 2**21
"""Pairs of feature and number of firing positives that are held at once: some 200 MB."""
SKEWED = 1e-3
"""From this skewness on, the gamma distribution is used."""
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
    # What float64 leaves of the squares of a constant column is rounding, not spread.
    spread[spread <= 1e-12 * total_squares] = 0
    deviation = np.sqrt(spread / (n_positive + n_negative - 2))
    difference = mean_positive - mean_negative
    nothing = np.abs(difference) <= 1e-12 * (mean_positive + mean_negative)
    difference = np.where(nothing, 0.0, difference)
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

        Two-sided: twice the smaller tail. From LIKELY on, p is that of the normal approximation
        with corrections for ties and continuity, which is quicker and accurate there.
        """
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
        high = (u > pairs / 2)[features, runs]
        chosen_in = n_positive[runs].astype(np.int64)
        p[features, runs] = self._tails(sums[features, runs], high, features, n, chosen_in)
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


@dataclass(frozen=True)
class Scores:
    """How far each feature's firing documents rank above the others; every array is `[d_sae]`."""

    documents: Ints  # how many fire
    mean: Floats
    variance: Floats  # over the firing documents; 0 where all are equal
    skewness: Floats
    least: Floats
    most: Floats
    gap: Floats  # the smallest step between two different scores; 0 where all are equal

    def take(self, features: Ints) -> Scores:
        return Scores(*(getattr(self, name)[features] for name in self.__dataclass_fields__))


def scores_of(values: Floats, indptr: Ints) -> Scores:
    """Summarise the scores of all features, given one after the other, ascending within each."""
    counts = np.diff(indptr)
    size = len(counts)
    column = np.repeat(np.arange(size), counts)
    per = np.maximum(counts, 1)
    mean = np.bincount(column, values, size) / per
    off = values - mean[column]
    variance = np.bincount(column, off**2, size) / per
    third = np.bincount(column, off**3, size) / per
    least, most = np.zeros(size), np.zeros(size)
    some = counts > 0
    least[some], most[some] = values[indptr[:-1][some]], values[indptr[1:][some] - 1]
    variance[most - least < 0.25] = 0  # ranks differ by a half or more, or not at all
    steps = np.diff(values)
    inside = (column[1:] == column[:-1]) & (steps > 0.25)
    gap = np.full(size, np.inf)
    np.minimum.at(gap, column[1:][inside], steps[inside])
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(variance > 0, third / variance**1.5, 0.0)
    gap[np.isinf(gap)] = 0.0
    return Scores(counts.astype(np.int64), mean, variance, skewness, least, most, gap)


def upper_tail(sums: Floats, scores: Scores, n: int, n_chosen: Ints) -> Floats:
    """P(the scores of `n_chosen` of n random documents add up to `sums` or more). `[m]` all

    `scores` are those of the m features, one for each sum.
    """
    found = np.zeros(len(sums))
    low = np.maximum(0, scores.documents + n_chosen - n)
    width = np.minimum(scores.documents, n_chosen) - low + 1
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    for part in _blocks(width):
        some = scores.take(part)
        at = np.repeat(np.arange(len(part)), width[part])
        starts = np.cumsum(width[part]) - width[part]
        k = low[part][at] + np.arange(len(at)) - starts[at]  # firing documents that are chosen
        m, chosen = some.documents[at], n_chosen[part][at]
        ways = _log_choose(log_factorial, m, k)
        log_share = (
            ways
            + _log_choose(log_factorial, n - m, chosen - k)
            - _log_choose(log_factorial, np.full_like(m, n), chosen)
        )
        reach = _tail_within(sums[part][at], k, at, some, np.exp(-ways))
        found[part] = np.add.reduceat(np.exp(log_share) * reach, starts)
    return np.minimum(found, 1.0)


def _tail_within(sums: Floats, k: Ints, at: Ints, scores: Scores, one: Floats) -> Floats:
    """P(k of a feature's firing documents score `sums` or more together).

    `one` is the probability of a single choice of k documents: no tail that can be reached is
    smaller.
    """
    m = scores.documents[at]
    left = np.maximum(m - 1, 1)
    deviation = np.sqrt(k * (m - k) / left * scores.variance[at])
    centre = k * scores.mean[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (sums - scores.gap[at] / 2 - centre) / deviation
        skewness = scores.skewness[at] * (m - 2 * k) / (m - 2) * np.sqrt((m - 1) / (k * (m - k)))
    tail: Floats = np.maximum(ndtr(-z), one)
    skewed = (deviation > 0) & (skewness > SKEWED)
    if skewed.any():
        shape = 4 / skewness[skewed] ** 2
        place = np.maximum(shape + 2 * z[skewed] / skewness[skewed], 0)
        tail[skewed] = np.maximum(tail[skewed], gammaincc(shape, place))
    slack = 1e-6 * np.maximum(1.0, np.abs(sums))
    tail = np.where(deviation > 0, tail, (centre >= sums - slack).astype(np.float64))
    tail[k * scores.most[at] < sums - slack] = 0  # out of reach
    tail[k * scores.least[at] >= sums - slack] = 1  # certain
    return tail


def _log_choose(log_factorial: Floats, n: Ints, k: Ints) -> Floats:
    result: Floats = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    return result


def _blocks(width: Ints) -> Iterator[Ints]:
    """Numbers of features whose cells together fit into memory."""
    block = np.cumsum(width) // CELLS
    for part in np.split(np.arange(len(width)), np.flatnonzero(np.diff(block)) + 1):
        if len(part):
            yield part
