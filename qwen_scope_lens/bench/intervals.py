"""Bootstrap: how far a figure would move with another draw of items, or of benchmarks.

A resample with replacement holds only about 63% of the distinct items, so whatever counts distinct
things (a union of features) is smaller in it than in the benchmark. The interval of such a figure
is therefore *centred*: the spread of the resamples around their own mean, put around the estimate.
Figures without that bias (a correlation over benchmarks) keep the plain percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.bench.footprint import Footprint
from qwen_scope_lens.errors import TooLittleData

__all__ = [
    "DRAWS",
    "LEVEL",
    "Interval",
    "centred",
    "over_benchmarks",
    "percentile",
    "ratio",
    "resampled",
]

DRAWS = 200
LEVEL = 0.95
CHUNK = 2**24
"""Cells of the table [features, draws] that are held at once: 64 MB as float32."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where it lies with `LEVEL` confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(above: Any, below: Any) -> np.ndarray:
    """Their quotient; NaN where nothing stands below, as in a resample that activates nothing."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    result: np.ndarray = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return result


def percentile(value: float, draws: np.ndarray) -> Interval:
    """The interval between the outer percentiles of the resamples; NaN draws are left out."""
    kept = np.asarray(draws, dtype=float)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def centred(
    value: float, draws: np.ndarray, least: float = -np.inf, most: float = np.inf
) -> Interval:
    """The same, moved so that the resamples' mean falls on the estimate; cut to its range."""
    shifted = np.asarray(draws, dtype=float) - np.nanmean(draws) + value
    return percentile(value, np.clip(shifted, least, most))


def resampled(footprint: Footprint, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Counts m_j of resamples of the items, chunk by chunk: float32 `[|F|, draws in the chunk]`.

    Rows are `footprint.features`; the number of items is that of the benchmark.
    """
    n_items = len(footprint)
    rng = np.random.default_rng(seed)
    transposed = footprint.compact.T.tocsr()
    width = max(1, min(draws, CHUNK // max(footprint.size, n_items)))
    for start in range(0, draws, width):
        count = min(width, draws - start)
        weights = np.empty((n_items, count), dtype=np.float32)
        for column in range(count):
            drawn = rng.integers(0, n_items, n_items)
            weights[:, column] = np.bincount(drawn, minlength=n_items)
        yield transposed @ weights


def over_benchmarks(
    statistic: Callable[[np.ndarray], float], n: int, draws: int = 1000, seed: int = 0
) -> Interval:
    """A figure over n benchmarks, resampled with replacement: `statistic(numbers)`.

    Resamples of fewer than three different benchmarks, or where the figure is undefined, are left
    out.
    """
    if n < 3:
        raise TooLittleData(f"a correlation over {n} benchmarks: at least 3 are needed")
    rng = np.random.default_rng(seed)
    found = np.full(draws, np.nan)
    for i in range(draws):
        numbers = rng.integers(0, n, n)
        if len(np.unique(numbers)) >= 3:
            found[i] = statistic(numbers)
    return percentile(statistic(np.arange(n)), found)
