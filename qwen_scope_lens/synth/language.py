"""Which language a text is in: by script, and for Latin letters by a vote of function words.

Enough to reject a reply in the wrong language; no substitute for a trained detector. Short texts
and languages that are not in the table are not judged.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from qwen_scope_lens.errors import UnknownName

__all__ = ["LANGUAGES", "check_language", "script_shares", "wrong_language"]

LANGUAGES: Mapping[str, tuple[str, ...]] = {  # code -> scripts, the first one needed
    "am": ("ETHIOPIC",),
    "ar": ("ARABIC",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fr": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "it": ("LATIN",),
    "ja": ("KANA", "CJK"),
    "ko": ("HANGUL", "CJK"),
    "pt": ("LATIN",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "tr": ("LATIN",),
    "uk": ("CYRILLIC",),
    "vi": ("LATIN",),
    "zh": ("CJK",),
}

_WORDS = {
    "de": "der die das und ist nicht ein eine ich sie mit auf für zu den von wie kann werden auch",
    "en": "the and is of to in that it for with you are this on as not be can what how",
    "es": "el la los las que de y en un una es por con para no se del como más qué",
    "fr": "le la les des et est que un une dans pour pas vous du je ce sur qui avec au",
    "it": "il lo la gli che di e un una è per con non si del sono come più della nel",
    "pt": "o a os as que de e um uma é por com para não se do da como mais em",
    "tr": "bir ve bu için ne ile da de mi çok daha gibi olarak ama var nasıl değil olan ben kadar",
    "vi": "là và của có không cho một những được với các này trong tôi bạn như đã người khi làm",
}
_VOTES = {code: frozenset(words.split()) for code, words in _WORDS.items()}

LEAST_SHARE = 0.6
"""Of the letters of a text, how many have to be of the language's scripts: code and names are in
Latin letters everywhere."""

LEAST_WORDS = 12
"""Shorter texts in Latin letters are not put to the vote."""


def check_language(code: str) -> None:
    if code and code not in LANGUAGES:
        raise UnknownName(
            f"language {code!r} is not in the table: {', '.join(LANGUAGES)}; leave it empty to"
            " accept any"
        )


def wrong_language(text: str, code: str) -> str:
    """Why a text is not in the language, or nothing."""
    shares = script_shares(text)
    if not code or not shares:
        return ""
    scripts = LANGUAGES[code]
    share = sum(shares.get(script, 0.0) for script in scripts)
    most = max(shares, key=lambda script: shares[script])
    if share < LEAST_SHARE:
        return f"{most.title()} letters, expected {code}"
    if code == "ja" and not shares.get("KANA"):
        return "no kana, expected ja"
    if code in _VOTES:
        words = re.findall(r"\w+", text.casefold())
        votes = {other: sum(word in known for word in words) for other, known in _VOTES.items()}
        best = max(votes, key=lambda other: votes[other])
        if len(words) >= LEAST_WORDS and votes[best] > 2 * max(1, votes[code]):
            return f"function words of {best}, expected {code}"
    return ""


def script_shares(text: str) -> dict[str, float]:
    """Script -> share of the letters. Hiragana and katakana are both kana."""
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    total = sum(counts.values())
    return {script: n / total for script, n in counts.most_common()}


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "KANA" if first in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else first
