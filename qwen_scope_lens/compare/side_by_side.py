"""Read two stores of the same tokens and SAE block by block: sums and tests per feature.

A test counts the documents on which a figure rises and those on which it falls (`sign_test`);
`drift.py` interprets the p-values. The non-zero values of one layer of both stores are held in
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.features.cofiring import Cofiring

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["SideBySide", "side_by_side", "sign_test"]

Array = np.ndarray[Any, Any]

PARTNERS = 4
"""How many co-firing features are tested per feature and store."""

LEAST = 20
"""A pair is tested if it fires together on this many tokens in at least one store."""


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Figures of one layer in both stores; pairs of arrays are (base, tuned)."""

    tokens: int  # kept in both
    l0: tuple[float, float]
    overlap: float
    cosine: float
    count: tuple[Array, Array]  # tokens on which each feature fires, [d_sae]
    total: tuple[Array, Array]  # sum of its activations
    rate_p: Array
    strength_p: Array
    pairs: Array  # [n_pairs, 2]
    jaccard: tuple[Array, Array]  # [n_pairs]
    pair_p: Array


def side_by_side(base: FeatureStore, tuned: FeatureStore, layer: int) -> SideBySide:
    """Read one layer of both stores at once; the tokens must be the same."""
    from scipy.sparse import csr_matrix, vstack

    d_sae = base.sae(layer).d_sae
    tokens, overlap, cosine, active = 0, 0.0, 0.0, [0, 0]
    counts: list[list[Any]] = [[], []]  # documents x features: tokens on which it fires
    totals: list[list[Any]] = [[], []]
    fires: list[list[Any]] = [[], []]  # tokens x features
    cofiring = (Cofiring(d_sae), Cofiring(d_sae))
    docs = []
    for ours, theirs in zip(base.iter_blocks(layer), tuned.iter_blocks(layer), strict=True):
        if not np.array_equal(ours.token_ids, theirs.token_ids):
            raise StoreMismatch(
                f"the stores hold different tokens from document {int(ours.doc[0])} on. Extract"
                " both from one corpus with one tokenizer"
            )
        keep = np.flatnonzero(ours.keep & theirs.keep)
        if not len(keep):
            continue
        doc, position = ours.doc[keep], ours.position[keep]
        local = doc - doc[0]
        by_doc = csr_matrix(
            (np.ones(len(doc)), (local, np.arange(len(doc)))), shape=(local[-1] + 1, len(doc))
        )
        sides = [block.matrix()[keep].astype(np.float64) for block in (ours, theirs)]
        ones = [_ones(values) for values in sides]
        for side, block in enumerate((ours, theirs)):
            active[side] += ones[side].nnz
            counts[side].append(by_doc @ ones[side])
            totals[side].append(by_doc @ sides[side])
            fires[side].append(ones[side])
            cofiring[side].add(doc, position, block.indices[keep], block.active[keep])
        tokens += len(doc)
        overlap += _overlap(*ones)
        cosine += _cosine(*sides)
        docs.append(doc)
    if not tokens:
        raise TooLittleData(f"layer {layer}: every token is a first token or of extreme norm")
    count, total = ([vstack(part).tocsc() for part in side] for side in (counts, totals))
    columns = [vstack(part).tocsc() for part in fires]
    pairs = np.unique(np.concatenate([_close_pairs(c) for c in cofiring]), axis=0)
    jaccard, pair_p = _pair_changes(columns, pairs, np.concatenate(docs))
    return SideBySide(
        tokens=tokens,
        l0=(active[0] / tokens, active[1] / tokens),
        overlap=overlap / tokens,
        cosine=cosine / tokens,
        count=(_sum(count[0]), _sum(count[1])),
        total=(_sum(total[0]), _sum(total[1])),
        rate_p=sign_test(*_signs(count[1] - count[0])),
        strength_p=sign_test(*_signs(_strength_change(count, total))),
        pairs=pairs,
        jaccard=jaccard,
        pair_p=pair_p,
    )


def sign_test(up: Array, down: Array) -> Array:
    """Exact two-sided p-values of `up` and `down` under a fair coin; 1 if both are 0."""
    from scipy.stats import binom

    n = up + down
    p = np.minimum(1.0, 2 * binom.cdf(np.minimum(up, down), np.maximum(n, 1), 0.5))
    return np.where(n > 0, p, 1.0)


def _signs(difference: Any) -> tuple[Array, Array]:
    """How many rows of each column rise, and how many fall."""
    columns = difference.tocsc()
    column = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    size = columns.shape[1]
    up = np.bincount(column[columns.data > 1e-9], minlength=size)
    return up, np.bincount(column[columns.data < -1e-9], minlength=size)


def _strength_change(count: list[Any], total: list[Any]) -> Any:
    """The change of the mean activation on documents where the feature fires in both stores."""
    both = _ones(count[0]).multiply(_ones(count[1])).tocsc()
    means = []
    for c, t in zip(count, total, strict=True):
        inverse = c.copy()
        inverse.data = 1.0 / inverse.data
        means.append(t.multiply(inverse).tocsc())
    return both.multiply(means[1] - means[0])


def _close_pairs(cofiring: Cofiring) -> Array:
    partner, count, _, _ = cofiring.partners(PARTNERS)
    a, at = np.nonzero((partner >= 0) & (count >= LEAST))
    b = partner[a, at]
    return np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1).astype(np.int64)


def _pair_changes(fires: list[Any], pairs: Array, doc: Array) -> tuple[tuple[Array, Array], Array]:
    from scipy.sparse import csr_matrix

    by_doc = csr_matrix((np.ones(len(doc)), (doc, np.arange(len(doc)))))
    per_doc, jaccard = [], []
    for columns in fires:
        both = columns[:, pairs[:, 0]].multiply(columns[:, pairs[:, 1]]).tocsc()
        alone = np.diff(columns.indptr)
        count = np.diff(both.indptr)
        union = alone[pairs[:, 0]] + alone[pairs[:, 1]] - count
        jaccard.append(count / np.maximum(union, 1))
        per_doc.append(by_doc @ both)
    return (jaccard[0], jaccard[1]), sign_test(*_signs(per_doc[1] - per_doc[0]))


def _overlap(x: Any, y: Any) -> float:
    """The sum of Jaccard indices of the rows' active sets; two empty sets count as equal."""
    shared = np.asarray(x.multiply(y).sum(1)).ravel()
    union = np.diff(x.indptr) + np.diff(y.indptr) - shared
    return float(np.where(union > 0, shared / np.maximum(union, 1), 1.0).sum())


def _cosine(x: Any, y: Any) -> float:
    squares = [np.asarray(m.multiply(m).sum(1)).ravel() for m in (x, y)]
    norms = np.sqrt(squares[0] * squares[1])
    dots = np.asarray(x.multiply(y).sum(1)).ravel()
    same = (squares[0] == 0) & (squares[1] == 0)
    return float(np.where(norms > 0, dots / np.where(norms > 0, norms, 1), same).sum())


def _ones(x: Any) -> Any:
    out = x.copy()
    out.data = np.ones_like(out.data)
    return out


def _sum(x: Any) -> Array:
    return np.asarray(x.sum(0)).ravel()
