"""Redundancy and overlap of benchmarks that are all cut to the same number of items.

R, R-hat and overlap all grow with the number of items, so a correlation between them over
benchmarks of different sizes is partly a correlation of sizes. Here every benchmark is as large as
the smallest one. R-hat is exact (`redundancy_at`); R and overlap are means over random subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.bench.correlation import (
    DRAWS,
    PairCorrelation,
    correlate,
    correlate_pairs,
    similarity,
)
from qwen_scope_lens.bench.coverage import redundancy_at
from qwen_scope_lens.bench.footprint import Footprint
from qwen_scope_lens.bench.overlap import overlap_matrix
from qwen_scope_lens.bench.panel import Scores, agreement
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.stats import Interval

__all__ = ["EqualSize", "equal_overlap", "equal_redundancy", "spread_enough"]

SUBSETS = 10


@dataclass(frozen=True, eq=False)
class EqualSize:
    """R and R-hat of benchmarks with `items` items each."""

    items: int
    names: tuple[str, ...]
    r: tuple[float, ...]
    r_hat: tuple[float, ...]
    pearson: Interval
    spearman: Interval


def spread_enough(scores: Scores, least: float) -> tuple[list[str], list[str]]:
    """The benchmarks on which the panel's accuracies have at least this standard deviation, and
    the others. On a benchmark at floor all models guess, and R measures noise."""
    spread = dict(zip(scores.benchmarks, scores.table.std(axis=0).tolist(), strict=True))
    good = [name for name, value in spread.items() if value >= least]
    return good, [name for name in spread if name not in good]


def equal_redundancy(
    footprints: Sequence[Footprint],
    scores: Scores,
    subsets: int = SUBSETS,
    seed: int = 0,
    resamples: int = DRAWS,
) -> EqualSize:
    """R against R-hat over benchmarks that are cut to the items of the smallest one."""
    if len(footprints) < 3:
        raise TooLittleData(f"{len(footprints)} benchmarks: a correlation over them needs 3")
    size = min(len(f) for f in footprints)
    rng = np.random.default_rng(seed)
    r = []
    for f in footprints:
        matrix = scores.results[f.name]
        drawn = [matrix[:, rng.choice(matrix.shape[1], size, False)] for _ in range(subsets)]
        ranked = [part for part in drawn if np.ptp(part.mean(1)) > 0]
        if not ranked:
            raise TooLittleData(f"{f.name}: all models score the same on {size} items")
        found = [agreement(f.name, part, draws=1, seed=seed) for part in ranked]
        r.append(float(np.mean([one.r.value for one in found])))
    r_hat = [redundancy_at(f, size) for f in footprints]
    straight, ranks = correlate(np.array(r), np.array(r_hat), seed, resamples)
    names = tuple(f.name for f in footprints)
    return EqualSize(size, names, tuple(r), tuple(r_hat), straight, ranks)


def equal_overlap(
    footprints: Sequence[Footprint],
    scores: Scores,
    control: np.ndarray | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
    resamples: int = DRAWS,
) -> PairCorrelation:
    """overlap_min at equal size against similarity of scores, with `control` held fixed if given.

    `control` are the panel's scores on a benchmark that is in none of the pairs. `[models]`
    """
    size = min(len(f) for f in footprints)
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(subsets):
        cut = [f.subset(np.sort(rng.choice(len(f), size, False))) for f in footprints]
        tables.append(overlap_matrix(cut, smallest=True))
    names = [f.name for f in footprints]
    alike = similarity(scores.only(names).table, names, control)
    return correlate_pairs(np.mean(tables, axis=0), alike, None, resamples - 1, seed, resamples)
