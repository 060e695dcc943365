"""Align two stores of the same texts on pieces of text that both tokenizers separate.

Within a document, a piece ends wherever both tokenizers have a token border. The activation of a
feature on a piece is its maximum over the tokens of the piece. If both stores have the same
tokenizer, the pieces are its tokens; tokens that are parts of one character share a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import StoreMismatch

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Aligned", "align", "common_documents", "pieces"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Aligned:
    """The activations of both stores; each row is the same piece of text in both."""

    a: csr_matrix  # [n_pieces, d_sae of A]
    b: csr_matrix  # [n_pieces, d_sae of B]
    doc: Array  # int64 [n_pieces], the number of the document in A
    n_docs: int
    tokens: tuple[int, int]  # tokens of A and of B in the pieces


def common_documents(a: FeatureStore, b: FeatureStore) -> list[tuple[int, int]]:
    """Pairs of documents with the same text, by their numbers in both stores."""
    numbers: dict[str, int] = {}
    for doc, text in enumerate(b.documents(["text"])["text"].to_pylist()):
        if text is not None:
            numbers.setdefault(text, doc)
    pairs = [
        (doc, numbers.pop(text))
        for doc, text in enumerate(a.documents(["text"])["text"].to_pylist())
        if text is not None and text in numbers
    ]
    if not pairs:
        raise StoreMismatch(
            f"{_name(a)} and {_name(b)} have no document with the same text. Extract both from one"
            " corpus, with the same chat template if there is one"
        )
    return pairs


def align(
    a: FeatureStore, layer_a: int, b: FeatureStore, layer_b: int, max_pieces: int = 2_000_000
) -> Aligned:
    """Read both layers and align them.

    Pieces with a first token or an extreme-norm token in either store are left out. Documents
    beyond `max_pieces` pieces are not read.
    """
    from tqdm import tqdm

    chosen, starts, total = [], [], 0
    cuts: list[tuple[Array, Array]] = []
    pairs = tqdm(common_documents(a, b), unit="doc", desc="align", disable=None)
    for doc_a, doc_b in pairs:
        of_a, of_b, n = pieces(a.spans(doc_a), b.spans(doc_b))
        if total and total + n > max_pieces:
            break
        chosen.append((doc_a, doc_b))
        cuts.append((of_a, of_b))
        starts.append(total)
        total += n
    x, good_a, used_a = _rows(
        a, layer_a, [p[0] for p in chosen], [c[0] for c in cuts], starts, total
    )
    y, good_b, used_b = _rows(
        b, layer_b, [p[1] for p in chosen], [c[1] for c in cuts], starts, total
    )
    good = good_a & good_b
    ends = np.append(np.array(starts, dtype=np.int64), total)
    doc = np.repeat(np.array([p[0] for p in chosen], dtype=np.int64), np.diff(ends))
    if not good.any():
        raise StoreMismatch(
            f"{_name(a)} and {_name(b)} share {len(chosen)} documents but no piece of text: they"
            " have no common token borders (stores made from token ids have no text to align)"
        )
    return Aligned(x[good], y[good], doc[good], len(chosen), (used_a, used_b))


def pieces(spans_a: Array, spans_b: Array) -> tuple[Array, Array, int]:
    """The piece of every token in two tokenizations of one text; -1 means none.

    `spans [n, 2]` are characters. `-> piece of each token of A, of each token of B, piece count`
    """
    borders = np.intersect1d(_borders(spans_a), _borders(spans_b))
    return _piece_of(spans_a, borders), _piece_of(spans_b, borders), max(0, len(borders) - 1)


def _borders(spans: Array) -> Array:
    """The start of the text, and all ends of tokens that do not lie inside another token."""
    if not len(spans) or (spans < 0).any():
        return np.zeros(0, dtype=np.int64)
    end = np.maximum.accumulate(spans[:, 1])
    following = np.append(np.minimum.accumulate(spans[::-1, 0])[::-1][1:], np.iinfo(np.int64).max)
    return np.unique(np.append(end[end <= following], spans[:, 0].min()))


def _piece_of(spans: Array, borders: Array) -> Array:
    if len(borders) < 2:
        return np.full(len(spans), -1, dtype=np.int64)
    piece = np.searchsorted(borders, spans[:, 1], side="left") - 1
    inside = (
        (spans[:, 1] > spans[:, 0]) & (spans[:, 1] <= borders[-1]) & (spans[:, 0] >= borders[0])
    )
    return np.where(inside, piece, -1)


def _rows(
    store: FeatureStore, layer: int, docs: list[int], cuts: list[Array], starts: list[int], n: int
) -> tuple[Any, Array, int]:
    """Activations of one store per piece, which pieces count, and the number of tokens in them."""
    from scipy.sparse import csr_matrix

    place = np.full(store.n_docs, -1, dtype=np.int64)
    place[docs] = np.arange(len(docs))
    seen, dropped = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    rows, columns, values, used = [], [], [], 0
    cut = np.concatenate(cuts)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in cuts])])
    for block in store.iter_blocks(layer, docs=docs):
        at = place[block.doc]
        local = cut[offsets[at] + block.position]
        piece = np.where(local >= 0, local + np.array(starts, dtype=np.int64)[at], -1)
        inside = piece >= 0
        dropped[piece[inside & ~block.keep]] = True
        seen[piece[inside & block.keep]] = True
        used += int((inside & block.keep).sum())
        active = (block.entries.values > 0) & (inside & block.keep)[:, None]
        row, entry = active.nonzero()
        rows.append(piece[row])
        columns.append(block.entries.indices[row, entry].astype(np.int64))
        values.append(block.entries.values[row, entry])
    d_sae = store.sae(layer).d_sae
    key = np.concatenate(rows) * d_sae + np.concatenate(columns)
    value = np.concatenate(values)
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    if len(key):
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
        key, value = key[first], np.maximum.reduceat(value, first)
    matrix = csr_matrix((value, np.divmod(key, d_sae)), shape=(n, d_sae), dtype=np.float32)
    return matrix, seen & ~dropped, used


def _name(store: FeatureStore) -> str:
    return str(getattr(store, "path", "a store"))
