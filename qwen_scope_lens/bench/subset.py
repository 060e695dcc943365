"""The smallest subset of a benchmark that keeps a given share of its footprint.

Finding it exactly is NP-hard (maximum coverage). The lazy greedy algorithm always takes the item
with the most features that are still missing. Two bounds are known for it: its coverage is at least
1 - 1/e of the best coverage by as many items, and the gains that it computes give a number of items
below which *no* subset of this benchmark reaches the share.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.bench.coverage import expected_features, size_for
from qwen_scope_lens.bench.footprint import Footprint
from qwen_scope_lens.errors import TooLittleData

__all__ = ["Subset", "choose"]

RANDOM_SUBSETS = 200


@dataclass(frozen=True, eq=False)
class Subset:
    """The chosen items in order, and the coverage of random subsets for comparison."""

    name: str
    n_items: int
    share: float  # of the footprint, as asked for
    chosen: np.ndarray  # [size], item numbers
    coverage: np.ndarray  # [size], share of the footprint after each
    at_least: int  # no subset with fewer items reaches the share
    random_mean: float  # mean coverage of random subsets of this size, exact
    random_low: float  # 95% of random subsets lie between these two, by sampling
    random_high: float
    random_size: int  # size at which a random subset is expected to reach the share

    @property
    def size(self) -> int:
        return len(self.chosen)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.size:,} of {self.n_items:,} items cover {self.coverage[-1]:.1%} of"
            f" the footprint (asked for {self.share:.1%})\n"
            f"  no subset of fewer than {self.at_least:,} items can; greedy covers at least 1 - 1/e"
            " of what the best subset of its size covers\n"
            f"  random subsets of {self.size:,} cover {self.random_mean:.1%} (95% of them"
            f" {self.random_low:.1%} to {self.random_high:.1%}); {self.random_size:,} random items"
            " would be needed"
        )


def choose(footprint: Footprint, share: float = 0.95, seed: int = 0) -> Subset:
    """Choose items greedily until they cover `share` of the footprint (0 < share <= 1)."""
    if not 0 < share <= 1:
        raise TooLittleData(f"coverage {share}: expected a share above 0 and up to 1")
    target = int(np.ceil(share * footprint.size - 1e-9))
    chosen, covered, at_least = _greedy(footprint, target)
    n_items, size = len(footprint), len(chosen)
    expected = expected_features(footprint.counts, n_items, [size])[0]
    sampled = _random_coverage(footprint, size, seed)
    return Subset(
        name=footprint.name,
        n_items=n_items,
        share=share,
        chosen=np.array(chosen),
        coverage=np.array(covered) / footprint.size,
        at_least=at_least,
        random_mean=float(expected / footprint.size),
        random_low=float(np.quantile(sampled, 0.025)),
        random_high=float(np.quantile(sampled, 0.975)),
        random_size=size_for(footprint, target / footprint.size),
    )


def _greedy(footprint: Footprint, target: int) -> tuple[list[int], list[int], int]:
    """The chosen items, the features covered after each, and the lower bound on their number.

    The gain of an item never rises as others are chosen, so an old gain is an upper bound, and only
    the top of the heap has to be counted again. Ties go to the lower item number.
    """
    matrix = footprint.compact
    features = np.split(matrix.indices, matrix.indptr[1:-1])
    missing = np.ones(footprint.size, dtype=bool)
    heap = [(-len(f), i) for i, f in enumerate(features)]
    heapq.heapify(heap)
    chosen: list[int] = []
    covered: list[int] = []
    done, at_least, look = 0, 1, 0
    while done < target:
        if len(chosen) == look:  # at 0, 1, 2, 4, 8, ...: the bound costs a pass over the matrix
            at_least = max(at_least, _fewest(matrix @ missing.astype(np.float32), target - done))
            look = max(1, 2 * look)
        while True:
            _, item = heapq.heappop(heap)
            gain = int(np.count_nonzero(missing[features[item]]))
            if not heap or (-gain, item) <= heap[0]:
                break
            heapq.heappush(heap, (-gain, item))
        missing[features[item]] = False
        done += gain
        chosen.append(item)
        covered.append(done)
    return chosen, covered, at_least


def _fewest(gains: np.ndarray, wanted: int) -> int:
    """A lower bound on the number of items that add `wanted` features to the covered ones.

    By submodularity, k items together add at most the sum of the k largest single gains.
    """
    most = np.cumsum(np.sort(gains)[::-1])
    return int(np.searchsorted(most, wanted - 1e-6)) + 1


def _random_coverage(footprint: Footprint, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = footprint.compact
    found = np.zeros(RANDOM_SUBSETS)
    for i in range(RANDOM_SUBSETS):
        covered = np.zeros(footprint.size, dtype=bool)
        covered[matrix[rng.choice(len(footprint), size, replace=False)].indices] = True
        found[i] = covered.mean()
    return found
