"""Filters: why a text is not kept, or nothing.

Length, language, refusals where there should be none and none where there should be, words that ask
for caution. Near-duplicates are `duplicates.py`. A filter reads one text and decides nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_scope_lens.synthesis.language import wrong_language
from qwen_scope_lens.synthesis.recipe import Recipe

__all__ = ["REFUSES", "check_reply", "check_text", "clean", "is_refusal"]

REFUSES = {"harmful": True, "benign": False}
"""Kind of prompt -> whether the reply has to decline. Replies to other kinds are not checked."""

BEGINNING = 240
"""Characters of a reply in which a refusal shows."""

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "「": "」"}


def clean(text: str) -> str:
    """What a model wrote without what it put around it: thoughts, a fence, quotes, a broken end."""
    text = _THOUGHT.sub("", text).strip().rstrip("�").strip()
    if fenced := re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL):
        text = fenced[1].strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


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
