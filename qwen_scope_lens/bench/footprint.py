"""The footprint of a benchmark: which features each of its items activates.

Equations 2-3 of the paper: `F(x_i) = {j : z_j(x_i) > 0}` at one token position, `F(D)` their union.
Everything in this room is counted from this one matrix. `suite.py` reads it from a feature store
at a layer and a token position; the other modules compute figures from it, with intervals from
resampled items (`resampled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, spmatrix

from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.features.pool import canonical

__all__ = [
    "DRAWS",
    "SATURATED",
    "Footprint",
    "check_comparable",
    "footprint",
    "resampled",
    "saturated",
]

SATURATED = 0.5
"""A footprint that uses a larger share of the dictionary says little about its benchmark."""

DRAWS = 200
CHUNK = 2**24
"""Cells of the table [features, draws] that are held at once: 64 MB as float32."""


@dataclass(frozen=True, eq=False)
class Footprint:
    """Items x features of one benchmark: 1 where an item activates a feature, else 0."""

    name: str
    items: csr_matrix  # [n_items, d_sae], ones as float32, no stored zeros, sorted
    keys: tuple[str, ...]  # one per item
    sae: str  # the address of the SAE; "" if it has none
    position: str  # the token of the prompt at which features were read

    def __len__(self) -> int:
        return int(self.items.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.items.shape[1])

    @cached_property
    def counts(self) -> np.ndarray:
        """m_j: how many items activate each feature. int64 `[d_sae]`"""
        return np.bincount(self.items.indices, minlength=self.d_sae)

    @cached_property
    def features(self) -> np.ndarray:
        """F(D): the features that any item activates, ascending. int64 `[|F|]`"""
        return np.flatnonzero(self.counts)

    @property
    def size(self) -> int:
        """|F(D)|"""
        return len(self.features)

    @property
    def share(self) -> float:
        """The share of the dictionary that the footprint uses.

        It is also the share of an unrelated footprint that this one would cover by chance if all
        features were equally likely.
        """
        return self.size / self.d_sae

    @cached_property
    def compact(self) -> csr_matrix:
        """`items` with only the columns of `features`. `[n_items, |F|]`"""
        column = np.zeros(self.d_sae, dtype=np.int32)
        column[self.features] = np.arange(self.size, dtype=np.int32)
        parts = (self.items.data, column[self.items.indices], self.items.indptr)
        return csr_matrix(parts, shape=(len(self), self.size))

    def subset(self, numbers: Sequence[int] | np.ndarray) -> Footprint:
        """The same benchmark with only these items, in this order."""
        rows = np.asarray(numbers, dtype=np.int64)
        keys = tuple(self.keys[i] for i in rows)
        return footprint(self.name, self.items[rows], keys, self.sae, self.position)

    def __repr__(self) -> str:
        return f"Footprint({self.name!r}, {len(self)} items, {self.size} of {self.d_sae} features)"


def footprint(
    name: str,
    items: csr_matrix | spmatrix | np.ndarray | Any,
    keys: Sequence[str] = (),
    sae: str = "",
    position: str = "last",
) -> Footprint:
    """Make a footprint from activations or booleans `[n_items, d_sae]`: all values above zero."""
    matrix = canonical(csr_matrix(canonical(items) > 0, dtype=np.float32))
    n_items = matrix.shape[0]
    if n_items == 0:
        raise TooLittleData(f"benchmark {name!r} has no items: there is nothing to measure")
    if matrix.nnz == 0:
        raise TooLittleData(
            f"benchmark {name!r}: none of its {n_items} items activates any feature at position"
            f" {position!r}, so its footprint is empty. Read another position or layer"
        )
    keys = tuple(str(key) for key in keys) or tuple(str(i) for i in range(n_items))
    if len(keys) != n_items:
        raise ValueError(f"{name}: {n_items} items but {len(keys)} keys")
    return Footprint(name, matrix, keys, sae, position)


def saturated(footprints: Sequence[Footprint]) -> list[str]:
    """One warning for each footprint that uses most of its dictionary."""
    return [
        f"{f.name}: saturated, its {len(f):,} items use {f.size:,} of the dictionary's {f.d_sae:,}"
        f" features. By chance alone it would cover {f.share:.2f} of any other footprint, so"
        " overlaps with it and its R-hat say little: take a wider SAE, fewer items, or another"
        " position"
        for f in footprints
        if f.share > SATURATED
    ]


def check_comparable(*footprints: Footprint) -> None:
    """Raise unless all footprints were read by the same SAE at the same position."""
    first = footprints[0]
    for other in footprints[1:]:
        for what, a, b in (
            ("SAE", first.sae, other.sae),
            ("width", first.d_sae, other.d_sae),
            ("position", first.position, other.position),
        ):
            if a != b:
                raise StoreMismatch(
                    f"{first.name} and {other.name} cannot be compared: {what} {a!r} against"
                    f" {b!r}. Extract both with the same settings"
                )


def resampled(footprint: Footprint, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Counts m_j of bootstrap resamples of the items: float32 `[|F|, draws in the chunk]`.

    Rows are `footprint.features`; every resample has as many items as the benchmark. Resamples come
    in chunks, so that memory stays bounded. A resample holds only about 63% of the distinct items,
    so a figure that counts distinct features needs `stats.centred`.
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
