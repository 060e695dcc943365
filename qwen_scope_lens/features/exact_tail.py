"""How likely a rank sum is by chance where a feature fires rarely: the tail behind `contrast.py`.

A normal distribution says nothing about the far tail of a rank sum whose values are mostly zeros: a
feature that fires on 3 of 2,000 documents, two of them among 48 positive ones, is no wonder among
65,536 features, and a normal distribution makes it one in a million. So the sum over the positive
documents is taken apart. How many of the firing documents are positive is exact (hypergeometric);
only the order of the firing documents among themselves is approximated, by a normal distribution
(without ties its tails are longer than the true ones), or, where ties skew it, by a gamma
distribution of the same skewness. Where all values are equal the result is Fisher's exact test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaincc, gammaln, ndtr

__all__ = ["Scores", "scores_of", "upper_tail"]

CELLS = 2**21
"""Pairs of feature and number of firing positives that are held at once: some 200 MB."""
SKEWED = 1e-3
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Scores:
    """What each feature's firing documents score above the others (ranks); all `[d_sae]`."""

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
    """From the scores of all features, one after the other, ascending within each."""
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
    return Scores(
        counts.astype(np.int64), mean, variance, skewness, least, most,
        np.where(np.isfinite(gap), gap, 0.0),
    )  # fmt: skip


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
    """P(k of a feature's firing documents score `sums` or more together); `one` is that of a
    single choice of k, than which no tail that can be reached is smaller."""
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
