"""Coverage curves and the redundancy proxy: equations 7-9, in closed form.

`c_n = E|F(S)| / |F(D)|` over random subsets S of n items is computed without sampling. S misses a
feature that m of N items activate with probability C(N-m, n) / C(N, n), so
`c_n = (1/|F|) sum_j [1 - C(N-m_j, n) / C(N, n)]` and `sum_n c_n = ((N+1)/|F|) sum_j m_j/(m_j+1)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from qwen_scope_lens.bench.footprint import DRAWS, Footprint, resampled
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.stats import Interval, centred, ratio

__all__ = [
    "Curve",
    "Redundancy",
    "coverage_curve",
    "expected_features",
    "missed",
    "redundancy",
    "redundancy_at",
    "size_for",
    "size_grid",
]

GRID = 60
BLOCK = 2**22
"""Cells of the table [counts, sizes] that are held at once: 32 MB as float64."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The share of the footprint that a random subset of n items covers."""

    name: str
    sizes: np.ndarray  # [points], int
    coverage: np.ndarray  # [points], in 0..1
    low: np.ndarray  # bootstrap over the items, [points]
    high: np.ndarray


@dataclass(frozen=True)
class Redundancy:
    """The redundancy of one benchmark as R-hat estimates it, and the counts behind it."""

    name: str
    n_items: int
    n_features: int  # |F(D)|
    features_per_item: float
    auc: Interval  # equation 8
    r_hat: Interval  # equation 9
    half: int  # size at which a random subset is expected to cover half of the footprint
    new_per_item: float  # features that one more item like these would add (Good-Turing)


def missed(n_items: int, counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The probability that a subset of n items has none of m: C(N-m, n) / C(N, n).

    `-> [counts, sizes]`. Computed by log-gamma, which neither overflows nor loses digits with tens
    of thousands of items.
    """
    left = n_items - np.asarray(counts, dtype=np.float64)[:, None]
    n = np.asarray(sizes, dtype=np.float64)[None, :]
    possible = n <= left
    room = np.where(possible, left - n, 0.0)
    log = gammaln(left + 1) - gammaln(room + 1) - gammaln(n_items + 1) + gammaln(n_items - n + 1)
    return np.where(possible, np.exp(np.minimum(log, 0.0)), 0.0)


def expected_features(
    counts: np.ndarray, n_items: int, sizes: Sequence[int] | np.ndarray
) -> np.ndarray:
    """E|F(S)| for random subsets S of each size. `-> float64 [sizes]`"""
    sizes = np.asarray(sizes, dtype=np.int64)
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= n_items:
        raise ValueError(
            f"subset sizes {sizes.min()}..{sizes.max()} of {n_items} items: expected 0..{n_items}"
        )
    different, times = np.unique(counts[counts > 0], return_counts=True)
    found = np.zeros(len(sizes))
    width = max(1, BLOCK // max(1, len(different)))
    for start in range(0, len(sizes), width):
        part = slice(start, start + width)
        found[part] = times @ (1.0 - missed(n_items, different, sizes[part]))
    return found


def size_grid(n_items: int, points: int = GRID) -> np.ndarray:
    """Subset sizes from 1 to N, at most about `points`, denser at small sizes."""
    if n_items <= points:
        return np.arange(1, n_items + 1)
    return np.unique(np.geomspace(1, n_items, points).round().astype(np.int64))


def coverage_curve(
    footprint: Footprint,
    sizes: Sequence[int] | np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Curve:
    """c_n at the given sizes (default: a grid), with a bootstrap band over the items."""
    n_items = len(footprint)
    grid = size_grid(n_items) if sizes is None else np.asarray(sizes, dtype=np.int64)
    coverage = expected_features(footprint.counts, n_items, grid) / footprint.size
    drawn = [
        ratio(expected_features(column, n_items, grid), np.count_nonzero(column))
        for chunk in resampled(footprint, draws, seed)
        for column in chunk.T
    ]
    bands = [centred(c, np.array([d[i] for d in drawn]), 0.0, 1.0) for i, c in enumerate(coverage)]
    low, high = (np.array([getattr(band, end) for band in bands]) for end in ("low", "high"))
    return Curve(footprint.name, grid, coverage, low, high)


def redundancy(footprint: Footprint, draws: int = DRAWS, seed: int = 0) -> Redundancy:
    """AUC and R-hat with intervals (equations 8 and 9)."""
    n_items, counts = len(footprint), footprint.counts
    if n_items < 2:
        raise TooLittleData(
            f"benchmark {footprint.name!r} has one item: redundancy needs at least two"
        )
    auc, r_hat = _indices(counts[footprint.features][:, None], n_items)
    drawn = [_indices(chunk, n_items) for chunk in resampled(footprint, draws, seed)]
    aucs, r_hats = (np.concatenate([pair[i] for pair in drawn]) for i in (0, 1))
    return Redundancy(
        name=footprint.name,
        n_items=n_items,
        n_features=footprint.size,
        features_per_item=float(counts.sum() / n_items),
        auc=centred(float(auc[0]), aucs, 0.0, 1.0),
        r_hat=centred(float(r_hat[0]), r_hats, 0.0),
        half=size_for(footprint, 0.5),
        new_per_item=float(np.count_nonzero(counts == 1) / n_items),
    )


def redundancy_at(footprint: Footprint, size: int) -> float:
    """R-hat of a random subset of `size` items, which makes benchmarks of any size comparable.

    R-hat grows with N. This is equation 9 for a benchmark of which only `size` items are kept:
    `sum_{n <= size} u_n / u_size^2` with `u_n = E|F(S)|`, |S| = n. It is computed in closed form
    and is the ratio of expectations, not the expectation of the ratio.
    """
    if not 1 < size <= len(footprint):
        raise TooLittleData(
            f"a subset of {size} items of {footprint.name}: expected 2 to {len(footprint)}"
        )
    expected = expected_features(footprint.counts, len(footprint), np.arange(1, size + 1))
    return float(expected.sum() / expected[-1] ** 2)


def size_for(footprint: Footprint, share: float) -> int:
    """The smallest n with c_n >= share, by bisection."""
    low, high = 1, len(footprint)
    while low < high:
        middle = (low + high) // 2
        covered = expected_features(footprint.counts, len(footprint), [middle])[0]
        enough = covered >= share * footprint.size - 1e-9
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _indices(counts: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """AUC and R-hat of each column of counts. `[features, draws] -> [draws], [draws]`"""
    m = counts.astype(np.float64)
    size = np.count_nonzero(counts, axis=0)
    total = ratio((n_items + 1) * (m / (m + 1)).sum(0), size)  # sum of c_n over n = 1..N
    return total / n_items, ratio(total, size)
