"""Blocks: the tokens of whole documents with their codes, made of one shard after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from qwen_scope_lens.stores.codec import Packed, as_codes, as_matrix
from qwen_scope_lens.stores.shard_reader import Shard, spans_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.saes.codes import SparseCodes

__all__ = ["BLOCK_TOKENS", "Block", "DocumentBlock", "blocks_of", "document_block"]

BLOCK_TOKENS = 16384
"""The most tokens per block, unless a single document is longer."""


@dataclass(frozen=True)
class Block:
    """The tokens of some whole documents in one layer, one row per token."""

    doc: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n]
    token_ids: np.ndarray  # int64 [n]
    keep: np.ndarray  # bool [n]: neither a first token nor one of extreme norm
    values: np.ndarray  # float32 [n, k], 0 in padding
    indices: np.ndarray  # int32 [n, k], 0 in padding
    d_sae: int

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def active(self) -> np.ndarray:
        """Which entries are features that fire, as opposed to padding. bool `[n, k]`"""
        return self.values > 0

    def matrix(self) -> csr_matrix:
        """A row per token, a column per feature, no padding. float32 `[n, d_sae]`"""
        return as_matrix(self.values, self.indices, self.d_sae)

    @cached_property
    def codes(self) -> SparseCodes:
        """Values and indices as tensors, which share their memory. `[n]`"""
        return as_codes(self.values, self.indices, self.d_sae)


@dataclass(frozen=True)
class DocumentBlock(Block):
    """The tokens of one document."""

    tokens: list[str]
    spans: np.ndarray  # int64 [n, 2]: characters of the text; -1 where there is no text
    entries: dict[int, tuple[np.ndarray, np.ndarray, int]]  # values, indices and d_sae by layer

    @cached_property
    def layers(self) -> dict[int, SparseCodes]:
        """The codes of every layer of the store."""
        return {layer: as_codes(*entries) for layer, entries in self.entries.items()}


def blocks_of(shard: Shard, layer: int, local: np.ndarray, keep: bool) -> Iterator[Block]:
    """Blocks of some documents of a shard; `local` has their numbers within the shard."""
    token_ids, keeps, packed = shard.token_ids(), shard.keep(layer), shard.packed(layer)
    for group in _groups(local, np.diff(shard.offsets)):
        rows = _rows(shard.offsets, group)
        if keep:
            rows = rows[keeps[rows]]
        doc = np.searchsorted(shard.offsets, rows, side="right") - 1
        values, indices, d_sae = _entries(_take(packed, rows))
        yield Block(
            doc=doc + shard.first_doc,
            position=rows - shard.offsets[doc],
            token_ids=token_ids[rows],
            keep=keeps[rows],
            values=values,
            indices=indices,
            d_sae=d_sae,
        )


def document_block(shard: Shard, doc: int, layer: int, layers: tuple[int, ...]) -> DocumentBlock:
    """One document of a shard; `doc` is its number in the store."""
    start, end = shard.offsets[doc - shard.first_doc : doc - shard.first_doc + 2].tolist()
    rows = shard.some_tokens(start, end)
    entries = {stored: _entries(shard.packed(stored).rows(start, end)) for stored in layers}
    values, indices, d_sae = entries[layer]
    keep = ~rows[f"extreme_{layer}"].to_numpy(zero_copy_only=False)
    keep[:1] &= shard.has_last_tokens
    return DocumentBlock(
        doc=np.full(end - start, doc, dtype=np.int64),
        position=np.arange(end - start, dtype=np.int64),
        token_ids=rows["token_id"].to_numpy().astype(np.int64),
        keep=keep,
        values=values,
        indices=indices,
        d_sae=d_sae,
        tokens=rows["token"].to_pylist(),
        spans=spans_of(rows),
        entries=entries,
    )


def _entries(packed: Packed) -> tuple[np.ndarray, np.ndarray, int]:
    return packed.numbers(), packed.indices(), packed.d_sae


def _groups(docs: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of documents with at most BLOCK_TOKENS tokens together, or of one longer document."""
    start, tokens = 0, 0
    for i, doc in enumerate(docs):
        if i > start and tokens + lengths[doc] > BLOCK_TOKENS:
            yield docs[start:i]
            start, tokens = i, 0
        tokens += int(lengths[doc])
    yield docs[start:]


def _rows(offsets: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """The rows of some documents, one after the other."""
    lengths = offsets[docs + 1] - offsets[docs]
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(offsets[docs] - (ends - lengths), lengths)


def _take(packed: Packed, rows: np.ndarray) -> Packed:
    """A slice (without a copy) where the rows are consecutive, else a gather."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return packed.rows(int(rows[0]), int(rows[-1]) + 1)
    return packed.take(rows)
