"""Pairs of texts, one preferred and one rejected, as documents for a feature store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.stores.corpus import Document, read_rows

__all__ = ["PAIR", "PREFERRED", "REJECTED", "SIDE", "pairs_of"]

PAIR, SIDE = "pair", "side"
"""Labels of the documents."""
PREFERRED, REJECTED = "preferred", "rejected"


def pairs_of(
    path: str | Path, preferred: str = "chosen", rejected: str = "rejected"
) -> Iterator[Document]:
    """The two texts of every row, as documents with the labels `pair` and `side`.

    `preferred` and `rejected` are columns. A chat counts by its last message, the reply.
    """
    for number, (where, row) in enumerate(read_rows(path)):
        for side, name in ((PREFERRED, preferred), (REJECTED, rejected)):
            value = row.get(name) if isinstance(row, dict) else None
            if isinstance(value, list) and value and isinstance(value[-1], dict):
                value = value[-1].get("content")
            if not isinstance(value, str) or not value.strip():
                have = ", ".join(row) if isinstance(row, dict) else "no columns"
                raise BadCorpus(f"{where}: expected a text in the column {name}, found {have}")
            yield Document(f"{number}-{side}", text=value, labels={PAIR: number, SIDE: side})
