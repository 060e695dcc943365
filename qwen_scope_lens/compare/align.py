"""Two stores of the same texts on common ground: pieces of text that both tokenizers cut out.

Within a document every place in the text where both have a token border ends a piece; a feature's
activation on a piece is its maximum over the tokens in it. With one tokenizer the pieces are the
tokens; tokens of half a character join the character's piece.
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
    """Both stores' activations, row by row on the same pieces of text."""

    a: csr_matrix  # [n_pieces, d_sae of A]
    b: csr_matrix  # [n_pieces, d_sae of B]
    doc: Array  # int64 [n_pieces], the document's number in A
    n_docs: int
    tokens: tuple[int, int]  # that went into the pieces, of A and of B


def common_documents(a: FeatureStore, b: FeatureStore) -> list[tuple[int, int]]:
    """Documents with the same text, by their numbers in both stores."""
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
            f"{_name(a)} and {_name(b)} have no document with the same text: extract both from one"
            " corpus, with the same chat template if there is one"
        )
    return pairs


def align(
    a: FeatureStore, layer_a: int, b: FeatureStore, layer_b: int, max_pieces: int = 2_000_000
) -> Aligned:
    """Read both layers and lay them side by side. Pieces with a first or extreme token on either
    side are left out. Documents beyond `max_pieces` pieces are not read."""
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
            " have no token borders in common (stores made from token ids have no text to align)"
        )
    return Aligned(x[good], y[good], doc[good], len(chosen), (used_a, used_b))


def pieces(spans_a: Array, spans_b: Array) -> tuple[Array, Array, int]:
    """The piece of every token of two tokenizations of one text, -1 for a token in none.

    `spans [n, 2]` are characters; `(piece of A's tokens, piece of B's tokens, number of pieces)`.
    """
    borders = np.intersect1d(_borders(spans_a), _borders(spans_b))
    return _piece_of(spans_a, borders), _piece_of(spans_b, borders), max(0, len(borders) - 1)


def _borders(spans: Array) -> Array:
    """Places in the text that no token covers on both sides: 0 and the clean ends of tokens."""
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
    """One store's activations per piece: matrix, which pieces count, how many tokens went in."""
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
        active = block.codes.active.numpy() & (inside & block.keep)[:, None]
        row, entry = active.nonzero()
        rows.append(piece[row])
        columns.append(block.codes.indices.numpy()[row, entry].astype(np.int64))
        values.append(block.codes.values.float().numpy()[row, entry])
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
