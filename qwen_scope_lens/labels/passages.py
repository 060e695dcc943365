"""Passages: the words around a token on which a feature fires, with its tokens in << >>.

Passages show features in prompts, and to describers and judges. Their texts come from a feature
store; callers decide which tokens they show.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.stores.store import DocumentBlock, FeatureStore

if TYPE_CHECKING:
    from qwen_scope_lens.features.statistics import Example

__all__ = ["Passages"]


class Passages:
    """Passages of one store. `before` and `after` count the tokens around a token."""

    def __init__(self, store: FeatureStore, before: int = 16, after: int = 8) -> None:
        self._store, self._before, self._after = store, before, after
        self._texts = store.documents(["text"])["text"]
        self._read = lru_cache(maxsize=256)(store.by_token)

    def plain(self, doc: int, position: int) -> str:
        """The words around a token, without marks."""
        return self._cut(doc, position, None, 0.0)

    def marked(self, layer: int, feature: int, example: Example, scale: float = 0.0) -> str:
        """The same with the feature's tokens in << >>; with `scale` (its maximum) each is followed
        by its strength from 0 to 10."""
        block = self._read(example.doc)
        values, indices, _ = block.entries[layer]
        mine = values * (indices == feature)
        return self._cut(example.doc, example.position, mine.max(axis=-1), scale)

    def moved(self, layer: int, feature: int, example: Example, rng: random.Random) -> str:
        """The same passage with as many marks on tokens where the feature is silent.

        Empty where it fires on every token of the passage.
        """
        values, indices, _ = self._read(example.doc).entries[layer]
        fires = ((indices == feature) & (values > 0)).any(-1)
        start, end = max(0, example.position - self._before), example.position + self._after + 1
        window = range(start, min(end, len(fires)))
        silent = [i for i in window if not fires[i]]
        count = min(len(silent), sum(bool(fires[i]) for i in window))
        if not count:
            return ""
        marks = np.zeros(len(fires))
        marks[rng.sample(silent, count)] = 1.0
        return self._cut(example.doc, example.position, marks, 0.0)

    def top(self, layer: int, feature: int, examples: Iterable[Example]) -> list[str]:
        """Marked passages, each only once."""
        found = [self.marked(layer, feature, example) for example in examples]
        return list(dict.fromkeys(found))

    def _cut(
        self, doc: int, position: int, values: np.ndarray[Any, Any] | None, scale: float
    ) -> str:
        block: DocumentBlock = self._read(doc)
        text = self._texts[doc].as_py()
        start, end = max(0, position - self._before), position + self._after + 1
        spans = block.spans[start:end]
        if text is None or not len(spans) or (spans < 0).any():
            return "".join(block.tokens[start:end])
        pieces: list[tuple[str, str, float]] = []  # what stands between, words, value
        at = int(spans[0, 0])
        for i, (left, right) in enumerate(spans.tolist(), start=start):
            value = 0.0 if values is None else float(values[i])
            if right <= at and pieces:  # a part of a character that is there already
                gap, words, before = pieces[-1]
                pieces[-1] = (gap, words, max(before, value))
            elif right > at:
                left = max(left, at)
                pieces.append((text[at:left], text[left:right], value))
                at = right
        marked = "".join(gap + _marked(words, value, scale) for gap, words, value in pieces)
        return " ".join(marked.split())


def _marked(words: str, value: float, scale: float) -> str:
    """`<<words>>` where the feature fires; the space before a word stands outside its mark."""
    if value <= 0:
        return words
    strength = f"({round(10 * value / scale)})" if scale > 0 else ""
    bare = words.lstrip() or words
    return f"{words[: len(words) - len(bare)]}<<{bare}>>{strength}"
