"""Why a text is not kept: what it says, its language, and duplicates.

Length, language, refusals where there should be none and none where there should be, words that ask
for caution. `Duplicates` finds near-duplicates. A filter reads one text and decides nothing else.

Works without words, so for Chinese as for English. MinHash only proposes candidates (banded, so
that a text is compared with a few others); what counts is the exact Jaccard similarity.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from qwen_scope_lens.synth.language import wrong_language
from qwen_scope_lens.synth.recipe import Recipe

__all__ = [
    "REFUSES",
    "Duplicates",
    "check_reply",
    "check_text",
    "is_refusal",
    "jaccard",
    "ngrams",
]

REFUSES = {"harmful": True, "benign": False}
"""Kind of prompt -> whether the reply has to decline. Replies to other kinds are not checked."""

BEGINNING = 240
"""Characters of a reply in which a refusal shows."""


def check_text(text: str, recipe: Recipe, caution: bool) -> str:
    """Why a prompt, a reply or a text is refused."""
    if not text:
        return "empty"
    if len(text) < recipe.least_characters:
        return "too short"
    if len(text) > recipe.most_characters:
        return "too long"
    if wrong := wrong_language(text, recipe.language):
        return f"wrong language: {wrong}"
    if caution and (word := _word_in(text, recipe.caution)):
        return f"caution: {word}"
    return ""


def check_reply(reply: str, kind: str, refusals: Sequence[str]) -> str:
    """Why a reply does not go with the kind of its prompt."""
    if kind not in REFUSES or REFUSES[kind] == is_refusal(reply, refusals):
        return ""
    return "a harmful prompt was answered" if REFUSES[kind] else "a benign prompt was refused"


def is_refusal(reply: str, refusals: Sequence[str]) -> bool:
    """Whether it begins by declining, by a list of phrases. A heuristic, as in the field."""
    start = reply[:BEGINNING].casefold().replace("’", "'")
    return any(phrase in start for phrase in refusals)


def _word_in(text: str, words: Sequence[str]) -> str:
    folded = text.casefold()
    for word in words:
        # Whole words where words are separated; anywhere in scripts that do not separate them.
        pattern = re.escape(word.casefold())
        edge = r"\b" if word.isascii() else ""
        if re.search(f"{edge}{pattern}{edge}", folded):
            return word
    return ""


GRAM = 4
PRIME = np.uint64((1 << 61) - 1)
HASHES, BAND = 128, 4
"""32 bands of 4: a pair of similarity 0.8 is missed once in twenty million, of 0.6 once in 85."""


def normal(text: str) -> str:
    """Without differences that no reader sees: form, case, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def ngrams(text: str) -> frozenset[str]:
    clean = normal(text)
    return frozenset(clean[i : i + GRAM] for i in range(max(1, len(clean) - GRAM + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class Duplicates:
    """Texts seen so far; `find` names the one that a new text repeats."""

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold = threshold
        rng = np.random.default_rng(seed)
        self._a = rng.integers(1, 1 << 31, HASHES, dtype=np.uint64)
        self._b = rng.integers(0, 1 << 31, HASHES, dtype=np.uint64)
        self._exact: dict[str, str] = {}
        self._grams: dict[str, frozenset[str]] = {}
        self._bands: dict[tuple[int, bytes], list[str]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        self._exact.setdefault(normal(text), name)
        if self.threshold < 1:
            grams = ngrams(text)
            self._grams[name] = grams
            for key in self._keys(grams):
                self._bands[key].append(name)

    def find(self, text: str) -> tuple[str, float] | None:
        """(name, similarity) of the most similar text at or above the threshold."""
        if (same := self._exact.get(normal(text))) is not None:
            return same, 1.0
        if self.threshold >= 1:
            return None
        grams = ngrams(text)
        near = {name for key in self._keys(grams) for name in self._bands.get(key, ())}
        best = max(((jaccard(grams, self._grams[name]), name) for name in near), default=None)
        return (best[1], best[0]) if best is not None and best[0] >= self.threshold else None

    def _keys(self, grams: frozenset[str]) -> list[tuple[int, bytes]]:
        hashes = np.array(
            [
                int.from_bytes(
                    hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=4).digest()
                )
                for gram in grams
            ],
            dtype=np.uint64,
        )
        # Numbers below 2^32 times numbers below 2^31: no overflow of 64 bits.
        signature = ((hashes[:, None] * self._a + self._b) % PRIME).min(axis=0)
        bands = signature.reshape(-1, BAND)
        return [(i, band.tobytes()) for i, band in enumerate(bands)]
