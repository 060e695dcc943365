"""Why a text is not kept: its length, its language, words that ask for caution, and repetition.

A reply also has to decline where its prompt is harmful, and may not where it is benign. Each check
looks at one text and says why it fails, or nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rensa import RMinHash, RMinHashLSH

from qwen_scope_lens.synth.language import wrong_language
from qwen_scope_lens.synth.recipe import Recipe
from qwen_scope_lens.writers.masking import whole_characters

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
"""A refusal is looked for in this many characters at the beginning of a reply."""


def check_text(text: str, recipe: Recipe, caution: bool) -> str:
    """Why a prompt, a reply or a text is not kept; empty where nothing speaks against it.

    With `caution` the recipe's words of caution count, too.
    """
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
    """Why a reply does not fit the kind of its prompt; empty where it does."""
    if kind not in REFUSES or REFUSES[kind] == is_refusal(reply, refusals):
        return ""
    return "a harmful prompt was answered" if REFUSES[kind] else "a benign prompt was refused"


def is_refusal(reply: str, refusals: Sequence[str]) -> bool:
    """Whether a reply begins by declining, by a list of phrases: the heuristic of the field."""
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
HASHES, BANDS = 128, 32
"""32 bands of 4 hashes: a pair of similarity 0.8 is missed once in twenty million, of 0.6 once in
85."""


def normal(text: str) -> str:
    """The text without differences that no reader sees: Unicode form, case, spaces."""
    return " ".join(unicodedata.normalize("NFKC", whole_characters(text)).casefold().split())


def ngrams(text: str) -> frozenset[str]:
    """All runs of four characters."""
    clean = normal(text)
    return frozenset(clean[i : i + GRAM] for i in range(max(1, len(clean) - GRAM + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of the n-grams of either text that both have."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class Duplicates:
    """Texts seen so far; `find` names the one that a new text repeats.

    MinHash only proposes candidates, so that a text is compared with a few others; what counts is
    the exact Jaccard similarity of character n-grams. That needs no words, and so works for
    Chinese as well as for English.
    """

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold, self._seed = threshold, seed
        self._exact: dict[str, str] = {}
        self._known: list[tuple[str, frozenset[str]]] = []
        self._candidates = RMinHashLSH(threshold, HASHES, BANDS)

    def add(self, name: str, text: str) -> None:
        self._exact.setdefault(normal(text), name)
        if self.threshold < 1:
            grams = ngrams(text)
            self._candidates.insert(len(self._known), self._hashes(grams))
            self._known.append((name, grams))

    def find(self, text: str) -> tuple[str, float] | None:
        """(name, similarity) of the most similar text at or above the threshold."""
        if (same := self._exact.get(normal(text))) is not None:
            return same, 1.0
        if self.threshold >= 1:
            return None
        grams = ngrams(text)
        near = (self._known[i] for i in self._candidates.query(self._hashes(grams)))
        best = max(((jaccard(grams, other), name) for name, other in near), default=None)
        return (best[1], best[0]) if best is not None and best[0] >= self.threshold else None

    def _hashes(self, grams: frozenset[str]) -> RMinHash:
        hashes = RMinHash(HASHES, self._seed)
        hashes.update(list(grams))
        return hashes
