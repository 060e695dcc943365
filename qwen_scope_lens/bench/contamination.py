"""Near-duplicates between two benchmarks, and how much of a benchmark a training set contains.

The similarity of two items is the Jaccard index of their sets of features. The benchmark itself
shows which similarity is suspicious: the similarities of its items to their nearest neighbours
within the benchmark are what a common subject alone gives. Footprints of whole prompts (position
"any") distinguish items far better than the last token, which is the same word in all items of many
benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.bench.footprint import Footprint, check_comparable
from qwen_scope_lens.bench.overlap import Ceiling, Overlap, ceiling, overlap
from qwen_scope_lens.errors import TooLittleData

__all__ = [
    "MOST_PAIRS",
    "Contamination",
    "Pair",
    "contamination",
    "near_duplicates",
    "nearest",
    "usual_nearness",
]

NEAR = 0.9
MOST_PAIRS = 10_000
"""The most pairs that are returned: a benchmark of equal prompts has millions of equal pairs."""
BLOCK = 2**22
"""Cells of the table of pairs that are held at once: 16 MB as float32."""


@dataclass(frozen=True)
class Pair:
    """Two items that activate nearly the same features."""

    first: str
    second: str
    jaccard: float


@dataclass(frozen=True)
class Contamination:
    """The items of a benchmark that a training set contains, and the overlap of both."""

    benchmark: str
    training: str
    threshold: float  # an item counts as contained from this Jaccard index on
    usual: float  # 99th percentile of the similarity to the nearest neighbour in the benchmark
    contained: tuple[Pair, ...]  # benchmark item and nearest training item; most similar first
    n_items: int
    overlap: Overlap  # of the benchmark with the training set
    ceiling: Ceiling  # of the benchmark with itself

    @property
    def share(self) -> float:
        return len(self.contained) / self.n_items


def near_duplicates(
    first: Footprint, second: Footprint, least: float = NEAR, most: int = MOST_PAIRS
) -> list[Pair]:
    """Pairs with a Jaccard similarity of at least `least`, most similar first, at most `most`.

    For a benchmark and itself, these are unordered pairs of different items.
    """
    if not 0 < least <= 1:
        raise TooLittleData(f"similarity {least}: expected above 0 and up to 1")
    check_comparable(first, second)
    same = first is second
    found = np.zeros((3, 0))  # rows, columns, similarities
    for start, block in _jaccard(first, second):
        rows, columns = np.nonzero(block >= least - 1e-6)
        new = np.stack([start + rows, columns, block[rows, columns]])
        if same:
            new = new[:, new[0] < new[1]]
        found = np.concatenate([found, new], axis=1)
        found = found[:, np.argsort(-found[2], kind="stable")[:most]]
    return [
        Pair(first.keys[int(row)], second.keys[int(column)], min(1.0, float(value)))
        for row, column, value in found.T
    ]


def nearest(first: Footprint, second: Footprint) -> tuple[np.ndarray, np.ndarray]:
    """For every item of `first` the most similar item of `second`: its number and the similarity.

    For a benchmark and itself, this is the most similar *other* item.
    """
    check_comparable(first, second)
    same = first is second
    numbers, values = [], []
    for start, block in _jaccard(first, second):
        if same:
            block[np.arange(len(block)), start + np.arange(len(block))] = -1.0
        numbers.append(block.argmax(1))
        values.append(np.minimum(block.max(1), 1.0))
    return np.concatenate(numbers), np.concatenate(values)


def usual_nearness(footprint: Footprint, quantile: float = 0.99) -> float:
    """A quantile over items of the similarity to the nearest neighbour within the benchmark."""
    if len(footprint) < 2:
        raise TooLittleData(
            f"benchmark {footprint.name!r} has one item: its nearest neighbour needs another one"
        )
    return float(np.quantile(nearest(footprint, footprint)[1], quantile))


def contamination(
    benchmark: Footprint, training: Footprint, least: float = NEAR, seed: int = 0
) -> Contamination:
    """Find benchmark items with a near-duplicate in the training set, and the overlap of both."""
    if not 0 < least <= 1:
        raise TooLittleData(f"similarity {least}: expected above 0 and up to 1")
    numbers, values = nearest(benchmark, training)
    contained = [
        Pair(benchmark.keys[i], training.keys[numbers[i]], float(values[i]))
        for i in np.argsort(-values, kind="stable")
        if values[i] >= least - 1e-6
    ]
    return Contamination(
        benchmark=benchmark.name,
        training=training.name,
        threshold=least,
        usual=usual_nearness(benchmark),
        contained=tuple(contained),
        n_items=len(benchmark),
        overlap=overlap(benchmark, training, seed=seed),
        ceiling=ceiling(benchmark, seed=seed),
    )


def _jaccard(first: Footprint, second: Footprint) -> Iterator[tuple[int, np.ndarray]]:
    """Similarities of all pairs in blocks: `(number of the first row, [rows, items of second])`."""
    sizes = [np.diff(f.items.indptr).astype(np.float32) for f in (first, second)]
    transposed = second.items.T.tocsr()
    height = max(1, BLOCK // max(1, len(second)))
    for start in range(0, len(first), height):
        rows = slice(start, start + height)
        shared = (first.items[rows] @ transposed).toarray()
        union = sizes[0][rows, None] + sizes[1][None, :] - shared
        yield start, np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
