"""Which language a text is in, by py3langid, whose model for 139 languages ships in its wheel.

A text is rejected only where another language is clearly more likely than the one that was asked
for: a text that says too little, such as a number or a name, passes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from qwen_scope_lens.errors import UnknownName

__all__ = ["check_language", "wrong_language"]

CLEARLY = 4.0
"""How many times as likely another language has to be before a text counts as wrong. On held-out
texts (`benchmarks/language_identification.py`) whole texts are then told apart without an error."""

NO_LANGUAGE = "zxx"
"""The detector's code for texts without words. A prompt of program code is not rejected for it."""


def check_language(code: str) -> None:
    """Raise `UnknownName` for a code that the detector does not know. An empty code is any."""
    if code and code not in (known := _detector().labels):
        listed = ", ".join(sorted(name for name in known if len(name) == 2))
        raise UnknownName(
            f"language {code!r} is not one that the detector knows: expected a code of ISO 639"
            f" such as {listed}; or leave it empty to accept any language"
        )


def wrong_language(text: str, code: str) -> str:
    """Why a text is not in the language of this code; empty where it may be."""
    if not code or not any(map(str.isalpha, text)):
        return ""
    likely = {name: p for name, p in _detector().rank(text) if name != NO_LANGUAGE}
    best = max(likely, key=lambda name: likely[name])
    return f"{best}, expected {code}" if likely[best] > CLEARLY * likely[code] else ""


@cache
def _detector() -> Any:
    """Loaded on first use, which takes about a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
