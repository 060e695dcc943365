"""From tokens to documents: one row of feature values per document, read from a store.

Code that takes such rows as a matrix from a user passes them through `canonical` first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.stores.store import Block, FeatureStore

__all__ = ["How", "canonical", "firing", "pool"]

How = Literal["max", "mean", "any", "last"]


def pool(
    store: FeatureStore,
    layer: int,
    how: How = "max",
    keep: bool = True,
    docs: Iterable[int] | None = None,
) -> csr_matrix:
    """One value per document and feature. `-> [n_docs, d_sae]` float32

    `how` is `max` or `mean` (over all tokens of the document, zeros included), `any` (1 where the
    feature fires at all) or `last` (the value on the last token). `keep` leaves out first tokens
    and tokens of extreme norm, but `last` always reads the last token. With `docs` there is one row
    for each of them, in the order given. A document without a token that counts has an empty row.
    """
    if how not in get_args(How):
        raise UnknownName(f"pooling {how!r}: expected one of {', '.join(get_args(How))}")
    order = None if docs is None else np.fromiter(map(int, docs), np.int64)
    facts = store.sae(layer)
    counts_all = how == "last" or not keep
    parts = [
        _pooled(block, how, facts.d_sae)
        for block in store.iter_blocks(layer, keep=not counts_all, docs=order)
    ]
    rows, columns, values = (
        (np.concatenate(part) for part in zip(*parts, _NOTHING, strict=True)) if parts else _NOTHING
    )
    matrix = csr_matrix((values, (rows, columns)), shape=(store.n_docs, facts.d_sae))
    matrix.sort_indices()
    return matrix if order is None else matrix[order]


def canonical(matrix: Any) -> csr_matrix:
    """The same matrix as CSR, with one stored value per cell, in order, none of them zero.

    SciPy allows a sparse matrix to hold a cell several times (the value is the sum), to hold zeros,
    and to hold a row in any order; code that counts stored values would then count wrongly. The
    caller's matrix is not changed.
    """
    found = csr_matrix(matrix)  # a CSR matrix shares its arrays
    if found.has_canonical_format and found.data.all():
        return found
    found = found.copy()
    found.sum_duplicates()
    found.eliminate_zeros()
    return found


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _pooled(block: Block, how: How, d_sae: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document, feature and value of each pooled entry of a block of whole documents."""
    if not len(block):
        return _NOTHING
    starts = np.nonzero(np.concatenate([[True], block.doc[1:] != block.doc[:-1]]))[0]
    docs, tokens = block.doc[starts], np.diff(np.append(starts, len(block)))
    values, indices = block.entries.values, block.entries.indices
    if how == "last":
        last = starts + tokens - 1
        values, indices = values[last], indices[last]
        starts = np.arange(len(docs))
    active = values > 0
    before = np.concatenate([[0], np.cumsum(active.sum(1))])
    entries = csr_matrix(  # one row per document; features repeat and are not in order
        (
            values[active],
            indices[active],
            before[np.append(starts, len(values))],
        ),
        shape=(len(docs), d_sae),
    )
    # Transposing twice is a sort by feature within each row, in linear time.
    entries = entries.tocsc().tocsr()
    row = np.repeat(np.arange(len(docs)), np.diff(entries.indptr))
    feature, value = entries.indices, entries.data
    if not len(row):
        return _NOTHING
    changes = (row[1:] != row[:-1]) | (feature[1:] != feature[:-1])
    first = np.nonzero(np.concatenate([[True], changes]))[0]
    row, feature = row[first], feature[first].astype(np.int64)
    if how == "any":
        pooled = np.ones(len(first), np.float32)
    elif how == "mean":
        sums = np.add.reduceat(value.astype(np.float64), first)
        pooled = (sums / tokens[row]).astype(np.float32)
    else:
        pooled = np.maximum.reduceat(value, first)
    return docs[row], feature, pooled


def firing(store: FeatureStore, layer: int) -> list[FeatureRef]:
    """The features of a layer that fire on some document of a store."""
    sae = LayerRef.parse(store.sae(layer).ref)
    features = sorted(set(pool(store, layer).indices.tolist()))
    return [sae.feature(feature) for feature in features]
