"""Which features fire on the same tokens: the closest partners of every feature.

The counts are exact for the tokens that are counted: all tokens, or a sample that depends on their
places alone when there are more than `most_tokens`. The product of the 0/1 matrix with itself is
computed in blocks of features, so memory does not grow with the square of d_sae.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_scope_lens.features.best_entries import place_hash, rank_within

__all__ = ["PAIR_TOKENS", "Cofiring"]

Array = np.ndarray[Any, Any]

PAIR_TOKENS = 100_000
"""The most tokens on which pairs are counted; at k = 50 about 20 MB of indices."""

LEAST = 5
"""Features that fire together on fewer tokens are not partners: most pairs meet once or twice."""

BLOCK = 1024


class Cofiring:
    """Collects the features that fire on each token; `partners` counts the pairs."""

    def __init__(self, d_sae: int, most_tokens: int = PAIR_TOKENS) -> None:
        self._d_sae, self._most = d_sae, most_tokens
        self._rows: list[tuple[Array, Array]] = []  # (hashes [n], indices [n, k], -1 = padding)
        self._held = 0
        self._ceiling = 2.0

    def add(self, doc: Array, position: Array, indices: Array, active: Array) -> None:
        """Add the tokens of a block: `[n]`, `[n]`, `[n, k]`, `[n, k]`."""
        key = place_hash(doc, position)
        mine = key < self._ceiling
        rows = np.where(active[mine], indices[mine], -1).astype(np.int32)
        self._rows.append((key[mine], rows))
        self._held += len(rows)
        if self._held > 2 * self._most:
            self._prune()

    def partners(self, size: int) -> tuple[Array, Array, Array, int]:
        """For every feature, the `size` other features of highest Jaccard index, ties by number.

        Returns `partner [d_sae, size]` (-1 where there are fewer), the `count` of tokens on which
        both fire, their `jaccard` index, and the number of tokens that were counted.
        """
        from scipy.sparse import csr_matrix

        if self._held > self._most:
            self._prune()
        partner = np.full((self._d_sae, size), -1, dtype=np.int32)
        count = np.zeros((self._d_sae, size), dtype=np.int64)
        jaccard = np.zeros((self._d_sae, size), dtype=np.float32)
        width = max((rows.shape[1] for _, rows in self._rows), default=0)
        if not self._held or not width:
            return partner, count, jaccard, self._held
        lengths = np.concatenate([(rows >= 0).sum(1) for _, rows in self._rows])
        columns = np.concatenate([rows[rows >= 0] for _, rows in self._rows])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        fires = csr_matrix(
            (np.ones(len(columns), dtype=np.int32), columns, starts),
            shape=(self._held, self._d_sae),
        )
        by_feature = fires.T.tocsr()
        alone = np.diff(by_feature.indptr).astype(np.int64)
        for start in range(0, self._d_sae, BLOCK):
            both = (by_feature[start : start + BLOCK] @ fires).tocoo()
            often = np.flatnonzero((both.data >= LEAST) & (both.row + start != both.col))
            a, b = both.row[often] + start, both.col[often]
            n = both.data[often].astype(np.int64)
            score = n / (alone[a] + alone[b] - n)
            order = np.lexsort((b, -score, a))
            a, b, n, score = a[order], b[order], n[order], score[order]
            rank = rank_within(a)
            top = rank < size
            at = (a[top], rank[top])
            partner[at], count[at], jaccard[at] = b[top], n[top], score[top]
        return partner, count, jaccard, self._held

    def _prune(self) -> None:
        keys = np.concatenate([key for key, _ in self._rows])
        width = max(rows.shape[1] for _, rows in self._rows)
        rows = np.concatenate(
            [
                np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)
                for _, rows in self._rows
            ]
        )
        chosen = np.argsort(keys, kind="stable")[: self._most]
        self._ceiling = float(keys[chosen[-1]])
        self._rows, self._held = [(keys[chosen], rows[chosen])], len(chosen)
