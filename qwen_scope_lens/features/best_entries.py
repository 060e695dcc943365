"""The few best entries of every feature, collected in bounded memory while a corpus is read.

`Best` holds at most `size` (document, position, value) entries per feature: those of the highest
priority, ties in order of document and position. With the value as the priority, these are the top
examples. With a hash of the place they are a uniform sample, which does not depend on the order in
which the corpus is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Best", "place_hash", "rank_within"]

Array = np.ndarray[Any, Any]

PENDING = 2_000_000
"""How many candidates may wait before they are merged: about 60 MB."""

ENTRY = np.dtype(
    [("feature", "i4"), ("position", "i4"), ("doc", "i8"), ("value", "f4"), ("priority", "f8")]
)


class Best:
    """The entries of highest priority of every feature; with `one_per_doc` one per document."""

    def __init__(self, d_sae: int, size: int, one_per_doc: bool, pending: int = PENDING) -> None:
        self._d_sae, self._size, self._one_per_doc = d_sae, size, one_per_doc
        self._held = np.zeros(0, dtype=ENTRY)
        self._waiting: list[Array] = []
        self._count, self._most = 0, max(1, pending)
        self._floor = np.full(d_sae, -np.inf)  # a new entry below this is not among the best

    def add(
        self, feature: Array, doc: Array, position: Array, value: Array, priority: Array
    ) -> None:
        good = priority >= self._floor[feature]
        entries = np.zeros(int(good.sum()), dtype=ENTRY)
        for name, column in zip(
            ("feature", "doc", "position", "value", "priority"),
            (feature, doc, position, value, priority),
            strict=True,
        ):
            entries[name] = column[good]
        self._waiting.append(entries)
        self._count += len(entries)
        if self._count >= self._most:
            self._merge()

    def result(self) -> tuple[Array, Array, Array]:
        """`doc`, `position` (-1 where there are fewer) and `value`, each `[d_sae, size]`."""
        self._merge()
        doc = np.full((self._d_sae, self._size), -1, dtype=np.int64)
        position = np.full((self._d_sae, self._size), -1, dtype=np.int32)
        value = np.zeros((self._d_sae, self._size), dtype=np.float32)
        rank = rank_within(self._held["feature"])
        at = (self._held["feature"], rank)
        doc[at], position[at] = self._held["doc"], self._held["position"]
        value[at] = self._held["value"]
        return doc, position, value

    def _merge(self) -> None:
        entries = np.concatenate([self._held, *self._waiting])
        self._waiting, self._count = [], 0
        entries = entries[
            np.lexsort(
                (entries["position"], entries["doc"], -entries["priority"], entries["feature"])
            )
        ]
        if self._one_per_doc and len(entries):
            # The sort is stable, so the first entry of each (feature, document) is its best.
            order = np.lexsort((entries["doc"], entries["feature"]))
            same = np.zeros(len(entries), dtype=bool)
            same[1:] = (np.diff(entries["feature"][order]) == 0) & (
                np.diff(entries["doc"][order]) == 0
            )
            keep = np.ones(len(entries), dtype=bool)
            keep[order[same]] = False
            entries = entries[keep]
        rank = rank_within(entries["feature"])
        self._held = entries[rank < self._size]
        last = self._held[rank_within(self._held["feature"]) == self._size - 1]
        self._floor[last["feature"]] = last["priority"]


def place_hash(doc: Array, position: Array, salt: Array | int = 0) -> Array:
    """A number in [0, 1) that depends on nothing but the place (splitmix64), for sampling."""
    with np.errstate(over="ignore"):
        x = doc.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x ^= position.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        x ^= np.asarray(salt).astype(np.uint64) * np.uint64(0x165667B19E3779F9)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def rank_within(group: Array) -> Array:
    """The place of each entry within its run of equal values, for a sorted array."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    new = np.ones(len(group), dtype=bool)
    new[1:] = group[1:] != group[:-1]
    starts = np.flatnonzero(new)
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))
