"""From tokens to documents: one row of features per document.

Reads a store, block by block; what a row is then used for is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix

from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.features.store import Block, FeatureStore

__all__ = ["How", "pool"]

How = Literal["max", "mean", "any", "last"]


def pool(
    store: FeatureStore,
    layer: int,
    how: How = "max",
    keep: bool = True,
    docs: Iterable[int] | None = None,
) -> csr_matrix:
    """Each document's features. `-> [n_docs, d_sae]` float32

    `max` and `mean` (over all its tokens, zeros included) of the values, `any`: 1 where it fires at
    all, `last`: the values on its last token. `keep` leaves out first and extreme-norm tokens; the
    last token counts always. With `docs` there is one row for each of them, in the order given.
    A document without a token that counts has an empty row.
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


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _pooled(block: Block, how: How, d_sae: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """document, feature, value of a block; a block holds whole documents."""
    if not len(block):
        return _NOTHING
    starts = np.concatenate([[True], block.doc[1:] != block.doc[:-1]])
    if how == "last":
        ends = np.concatenate([starts[1:], [True]])
        doc, codes = block.doc[ends], block.codes[np.nonzero(ends)[0]]
    else:
        doc, codes = block.doc, block.codes
    values, indices = codes.values.numpy(), codes.indices.numpy()
    active = values > 0
    rows = np.broadcast_to(doc[:, None], values.shape)[active]
    value = values[active]
    key = rows * d_sae + indices[active]
    if how == "last":
        return rows, indices[active].astype(np.int64), value
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    if not len(key):
        return _NOTHING
    [first] = np.nonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    unique = key[first]
    found_doc, found_feature = unique // d_sae, unique % d_sae
    if how == "any":
        pooled = np.ones(len(unique), np.float32)
    elif how == "max":
        pooled = np.maximum.reduceat(value, first)
    else:
        tokens = np.diff(np.append(np.nonzero(starts)[0], len(block)))
        count = tokens[np.searchsorted(block.doc[starts], found_doc)]
        pooled = (np.add.reduceat(value.astype(np.float64), first) / count).astype(np.float32)
    return found_doc, found_feature, pooled
