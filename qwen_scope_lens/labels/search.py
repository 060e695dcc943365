"""Labels by words: BM25 over the labels of a pack, so that a word finds what was written about it.

Words are compared without case, accents and a final s; Chinese, Japanese and Korean text is
compared character by character. The formula is the usual one (Robertson and Zaragoza 2009), with
its usual constants.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping

import regex

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.labels.packs import Label

__all__ = ["bm25", "words_of"]

SATURATION, LENGTH = 1.5, 0.75
_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]|[\p{L}\p{N}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    found = _WORD.findall(unicodedata.normalize("NFC", bare).casefold())
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found]


def bm25(labels: Mapping[FeatureRef, Label], query: str) -> dict[FeatureRef, float]:
    """The labels that share a word with the query, each with its score (above 0)."""
    wanted = set(words_of(query))
    counts: dict[FeatureRef, Counter[str]] = {}
    lengths: dict[FeatureRef, int] = {}
    documents: Counter[str] = Counter()
    total = 0
    for ref, label in labels.items():
        words = words_of(label.text)
        total += len(words)
        if found := wanted.intersection(words):
            counts[ref] = Counter(word for word in words if word in found)
            lengths[ref] = len(words)
            documents.update(found)
    n, mean = len(labels), total / max(1, len(labels))
    rarity = {word: math.log(1 + (n - df + 0.5) / (df + 0.5)) for word, df in documents.items()}
    return {
        ref: sum(
            rarity[word]
            * (SATURATION + 1)
            * count
            / (count + SATURATION * (1 - LENGTH + LENGTH * lengths[ref] / mean))
            for word, count in some.items()
        )
        for ref, some in counts.items()
    }
