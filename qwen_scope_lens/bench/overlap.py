"""How much of one benchmark's footprint another covers: equations 10 and 11.

`overlap(D1, D2) = |F1 & F2| / |F1|` is asymmetric; `overlap_min` divides by the smaller footprint.
Both grow with the number of items, so two figures are given for comparison: the *ceiling*, which
is what one half of a benchmark covers of its other half, and the overlap between equally many
items of both benchmarks, which is computed exactly and without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.bench.coverage import missed
from qwen_scope_lens.bench.footprint import DRAWS, Footprint, check_comparable, resampled
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.stats import Interval, between, centred, ratio

__all__ = ["Ceiling", "Overlap", "ceiling", "overlap", "overlap_matrix", "overlaps"]

SPLITS = 100


@dataclass(frozen=True)
class Overlap:
    """The share of the footprint of `first` that `second` covers."""

    first: str
    second: str
    shared: int  # |F1 & F2|
    overlap: Interval  # equation 10
    overlap_min: Interval  # equation 11
    at_size: int  # items of each benchmark in `equal`
    equal: float  # expected equation 10 between that many random items of each benchmark
    chance: float  # equation 10 if the second's features were a random draw from the dictionary


@dataclass(frozen=True)
class Ceiling:
    """What one random half of a benchmark covers of the other half: an upper reference."""

    name: str
    half: int  # items in each half
    overlap: Interval  # over random splits


def overlap(
    first: Footprint, second: Footprint, draws: int = DRAWS, seed: int = 0, at: int | None = None
) -> Overlap:
    """Both overlaps of a pair, with intervals over the items of both benchmarks.

    `at` is the number of items in `Overlap.equal`; by default the size of the smaller benchmark.
    """
    check_comparable(first, second)
    ones = _drawn(first, draws, seed)
    twos = ones if first is second else _drawn(second, draws, seed + 1)
    return _overlap(first, second, ones, twos, min(len(first), len(second)) if at is None else at)


def overlaps(footprints: Sequence[Footprint], draws: int = DRAWS, seed: int = 0) -> list[Overlap]:
    """Compute the overlap of every ordered pair of different benchmarks.

    The field `at_size` of each is the overlap at the item count of the smallest benchmark given.
    Raises `TooLittleData` for fewer than two.
    """
    if len(footprints) < 2:
        raise TooLittleData(f"an overlap needs two benchmarks; found {len(footprints)}")
    check_comparable(*footprints)
    size = min(len(f) for f in footprints)
    drawn = [_drawn(f, draws, seed + i) for i, f in enumerate(footprints)]
    parts = list(zip(footprints, drawn, strict=True))
    return [_overlap(a, b, x, y, size) for a, x in parts for b, y in parts if a is not b]


def overlap_matrix(footprints: Sequence[Footprint], smallest: bool = False) -> np.ndarray:
    """All overlaps without intervals; the diagonal is 1. `-> [benchmarks, benchmarks]`

    Row D1 and column D2 hold equation 10, or equation 11 with `smallest`.
    """
    check_comparable(*footprints)
    fires = np.stack([f.counts > 0 for f in footprints]).astype(np.float32)
    sizes = fires.sum(1)
    norm = np.minimum(sizes[:, None], sizes[None, :]) if smallest else sizes[:, None]
    result: np.ndarray = (fires @ fires.T / norm).astype(np.float64)
    return result


def ceiling(footprint: Footprint, splits: int = SPLITS, seed: int = 0) -> Ceiling:
    """Equation 10 between two random halves of one benchmark, with an interval over splits."""
    n_items = len(footprint)
    if n_items < 2:
        raise TooLittleData(f"benchmark {footprint.name!r} has one item: it cannot be split")
    half = n_items // 2
    rng = np.random.default_rng(seed)
    transposed = footprint.compact.T.tocsr()
    found = np.zeros(splits)
    for i in range(splits):
        order = rng.permutation(n_items)
        side = np.zeros((n_items, 2), dtype=np.float32)
        side[order[:half], 0] = 1
        side[order[half : 2 * half], 1] = 1
        fires = transposed @ side > 0
        size = int(fires[:, 0].sum())
        found[i] = float(fires.all(1).sum()) / size if size else np.nan
    if np.isnan(found).all():
        raise TooLittleData(f"benchmark {footprint.name!r}: no random half activates any feature")
    return Ceiling(footprint.name, half, between(float(np.nanmean(found)), found))


def _drawn(footprint: Footprint, draws: int, seed: int) -> np.ndarray:
    """Which features each resample of the items activates. `-> bool [|F|, draws]`"""
    chunks = [chunk > 0 for chunk in resampled(footprint, draws, seed)]
    return np.concatenate(chunks, axis=1)


def _overlap(
    first: Footprint, second: Footprint, ones: np.ndarray, twos: np.ndarray, size: int
) -> Overlap:
    _, in_first, in_second = np.intersect1d(
        first.features, second.features, assume_unique=True, return_indices=True
    )
    shared = len(in_first)
    both = (ones[in_first] & twos[in_second]).sum(0)
    sizes = ones.sum(0), twos.sum(0)
    return Overlap(
        first=first.name,
        second=second.name,
        shared=shared,
        overlap=centred(shared / first.size, ratio(both, sizes[0]), 0.0, 1.0),
        overlap_min=centred(
            shared / min(first.size, second.size), ratio(both, np.minimum(*sizes)), 0.0, 1.0
        ),
        at_size=size,
        equal=1.0 if first is second else _equal(first, second, size),
        chance=second.share,
    )


def _equal(first: Footprint, second: Footprint, size: int) -> float:
    """E|F(S1) & F(S2)| / E|F(S1)| for independent random subsets of `size` items each."""
    for footprint in (first, second):
        if not 1 <= size <= len(footprint):
            raise TooLittleData(
                f"a subset of {size} items of {footprint.name}: expected 1 to {len(footprint)}"
            )
    has_first, has_second = (
        1.0 - missed(len(f), f.counts[first.features], np.array([size]))[:, 0]
        for f in (first, second)
    )
    return float(has_first @ has_second / has_first.sum())
