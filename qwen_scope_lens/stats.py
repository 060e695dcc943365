"""Intervals and correlations: each once, and SciPy's wherever SciPy has it.

Every interval here holds with confidence `LEVEL`. What a bootstrap may draw again (documents,
prompts, benchmarks) is known in the rooms that own it; what is said from the draws is here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "LEVEL",
    "Interval",
    "between",
    "centred",
    "draws_of_groups",
    "pearson",
    "proportion",
    "ratio",
    "spearman",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval that holds it with confidence `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def between(value: float, draws: ArrayLike) -> Interval:
    """The interval between the outer percentiles of resamples. Draws that are NaN are left out."""
    kept = np.asarray(draws, dtype=float)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def centred(
    value: float, draws: ArrayLike, least: float = -np.inf, most: float = np.inf
) -> Interval:
    """The same, moved so that the mean of the resamples falls on the estimate, and cut to a range.

    For figures that count distinct things: a resample with replacement holds only about 63% of the
    distinct items, so such a figure is smaller in it than in the whole.
    """
    shifted = np.asarray(draws, dtype=float)
    shifted = shifted - np.nanmean(shifted) + value
    return between(value, np.clip(shifted, least, most))


def proportion(count: int, total: int) -> Interval:
    """A share with Wilson's interval, which also holds for shares near 0 and 1."""
    from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(LEVEL, method="wilson")
    return Interval(count / total, float(found.low), float(found.high))


def draws_of_groups(
    values: ArrayLike, groups: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means of `values` `[n]` when whole groups are drawn with replacement. `-> [draws]`

    For values that are not independent within a group, such as several replies to one prompt.
    """
    numbers: dict[Hashable, int] = {}
    rows = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = np.bincount(rows, weights=np.asarray(values, dtype=float), minlength=len(numbers))
    sizes = np.bincount(rows, minlength=len(numbers))
    picks = np.random.default_rng(seed).integers(len(numbers), size=(draws, len(numbers)))
    means: np.ndarray = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    return means


def ratio(above: ArrayLike, below: ArrayLike) -> np.ndarray:
    """The quotient; NaN where nothing stands below, as in a resample that activates nothing."""
    over, under = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    result: np.ndarray = np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
    return result


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation; NaN for fewer than two values and where one of them is constant."""
    return _correlation(np.asarray(x, dtype=float), np.asarray(y, dtype=float))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation; NaN for fewer than two values and where one is constant."""
    from scipy.stats import rankdata

    return _correlation(rankdata(x), rankdata(y))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """NumPy's: SciPy's `pearsonr` also makes a p-value, which takes ten times as long.

    A bootstrap over benchmarks asks for thousands of correlations.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):  # constant but for rounding
        return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
