"""Does this item add anything to the benchmark?

An item is judged by the features that the benchmark does not have yet. What is usual is known
without new data: leave each item of the benchmark out in turn and count what only it activates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.evaluation.footprint import Footprint, check_comparable

__all__ = ["Screened", "own_novelty", "screen"]


@dataclass(frozen=True)
class Screened:
    """One candidate item."""

    key: str
    n_features: int
    new: int  # that no item of the benchmark activates
    adds: int  # the same, after the candidates before it
    percentile: float  # share of the benchmark's own items that add less, ties by half

    @property
    def useful(self) -> bool:
        return self.adds > 0


def own_novelty(footprint: Footprint) -> np.ndarray:
    """How many features only this item activates. int64 `[items]`

    Its mean is the Good-Turing estimate of what one more item of the kind would add.
    """
    unique = (footprint.counts[footprint.features] == 1).astype(np.float32)
    return np.rint(footprint.compact @ unique).astype(np.int64)


def screen(benchmark: Footprint, candidates: Footprint) -> list[Screened]:
    """Each candidate in the order given; `adds` counts the candidates before it as taken."""
    check_comparable(benchmark, candidates)
    usual = np.sort(own_novelty(benchmark))
    known = benchmark.counts > 0
    taken = known.copy()
    found = []
    for key, features in zip(candidates.keys, _rows(candidates), strict=True):
        new = int(np.count_nonzero(~known[features]))
        below, upto = np.searchsorted(usual, new, "left"), np.searchsorted(usual, new, "right")
        found.append(
            Screened(
                key=key,
                n_features=len(features),
                new=new,
                adds=int(np.count_nonzero(~taken[features])),
                percentile=float(below + upto) / (2 * len(usual)),
            )
        )
        taken[features] = True
    return found


def _rows(footprint: Footprint) -> Sequence[np.ndarray]:
    return np.split(footprint.items.indices, footprint.items.indptr[1:-1])
