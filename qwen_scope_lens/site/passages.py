"""Stretches of text around tokens, with what one feature does on every token of them.

Read from the store for many features at once. Tokens that share a character are one piece, and no
stretch begins or ends inside a character.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.models.token_text import MOST_JOINED, Vocabulary

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Passage", "PassageReader"]

AT_ONCE = 1 << 16
"""Tokens whose codes are looked up at a time."""


@dataclass(frozen=True)
class Passage:
    """The text around one token on which a feature fires."""

    doc: int
    position: int  # of the token, in its document
    value: float
    pieces: list[str]
    values: dict[int, float]  # piece -> the feature's largest activation on it
    peak: int  # the piece that the token is in
    characters: tuple[int, int] | None  # from, to in the document's text; None: it has no text


class PassageReader:
    """Reads passages of one layer of a store."""

    def __init__(
        self,
        store: FeatureStore,
        layer: int,
        vocabulary: Vocabulary,
        before: int = 24,
        after: int = 10,
    ) -> None:
        self._store, self._layer, self._vocabulary = store, layer, vocabulary
        self._before, self._after = before, after

    @cached_property
    def _offsets(self) -> np.ndarray:
        lengths = self._store.documents(["n_tokens"])["n_tokens"].to_numpy()
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @cached_property
    def _token_ids(self) -> np.ndarray:
        """All tokens of the store as int32: four bytes per token, where the codes have hundreds."""
        return np.concatenate([shard.token_ids().astype(np.int32) for shard in self._store.shards])

    @cached_property
    def _spans(self) -> np.ndarray:
        """Where every token stands in its document's text. int32 `[tokens, 2]`"""
        return np.concatenate([shard.spans().astype(np.int32) for shard in self._store.shards])

    def read(self, feature: np.ndarray, doc: np.ndarray, position: np.ndarray) -> list[Passage]:
        """The passages of `[n]` features around `[n]` tokens, in the order given."""
        first, last = self._offsets[doc], self._offsets[doc + 1]
        place = first + position
        start = self._whole(np.maximum(first, place - self._before), first, last, -1)
        end = self._whole(np.minimum(last, place + 1 + self._after), first, last, 1)
        found: list[Passage] = []
        lengths = end - start
        cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // AT_ONCE)) + 1
        for chosen in np.split(np.arange(len(doc)), cuts):
            values = self._values(feature[chosen], doc[chosen], start[chosen], lengths[chosen])
            split = np.split(values, np.cumsum(lengths[chosen])[:-1])
            for i, here in zip(chosen.tolist(), split, strict=True):
                found.append(
                    self._passage(int(doc[i]), int(position[i]), int(start[i]), int(place[i]), here)
                )
        return found

    def _whole(
        self, edge: np.ndarray, first: np.ndarray, last: np.ndarray, step: int
    ) -> np.ndarray:
        """Move an edge out of the middle of a character, away from the passage's token."""
        ids, continues = self._token_ids, self._vocabulary.continues
        for _ in range(MOST_JOINED - 1):
            inside = (edge > first) & (edge < last)
            token = ids[np.where(inside, edge, first)]
            known = inside & (token < len(continues))
            known[known] = continues[token[known]]
            edge = edge + step * known
        return edge

    def _values(
        self, feature: np.ndarray, doc: np.ndarray, start: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """The features' values on the tokens of their passages, one after the other. `[sum]`"""
        which = np.repeat(np.arange(len(doc)), lengths)
        within = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = (start - self._offsets[doc])[which] + within
        where: Any = (doc[which], at)  # arrays are sequences of whole numbers
        codes = self._store.codes_at(self._layer, *where)
        mine = (codes.indices.numpy() == feature[which][:, None]) & codes.active.numpy()
        return np.where(mine, codes.values.float().numpy(), 0).sum(axis=1)

    def _passage(
        self, doc: int, position: int, start: int, place: int, values: np.ndarray
    ) -> Passage:
        tokens = self._token_ids[start : start + len(values)].tolist()
        pieces = self._vocabulary.pieces(tokens)
        owner = [number for number, piece in enumerate(pieces) for _ in range(piece.tokens)]
        on: dict[int, float] = {}
        for token in values.nonzero()[0].tolist():
            on[owner[token]] = max(on.get(owner[token], 0.0), float(values[token]))
        at = place - start
        text = [piece.text for piece in pieces]
        first, last = int(self._spans[start, 0]), int(self._spans[start + len(values) - 1, 1])
        characters = (first, last) if first >= 0 else None
        return Passage(doc, position, float(values[at]), text, on, owner[at], characters)
