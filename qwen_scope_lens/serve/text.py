"""Text that grows token by token: whole characters only, and never beyond a stop text.

A character may be spread over several tokens, and a stop text over several characters. What could
still become part of either is held back until it is decided.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from qwen_scope_lens.models.token_text import Vocabulary

__all__ = ["Characters", "GrowingText"]


class Characters:
    """What every token adds to a text: "" while a character is not complete."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary.bytes_of(token) or b"")

    def end(self) -> str:
        """What an incomplete character at the end stands for."""
        return self._decoder.decode(b"", True)


class GrowingText:
    """A reply's text. `stopped` is true once a stop text has come; it is not part of the text."""

    def __init__(
        self, vocabulary: Vocabulary, special: frozenset[int], stop: Sequence[str] = ()
    ) -> None:
        self._characters, self._special, self._stop = Characters(vocabulary), special, tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self.text = ""
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain to be new in the text."""
        if self.stopped or token in self._special:
            return ""
        return self._grow(self._characters.add(token))

    def end(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        rest = self._grow(self._characters.end())
        if self.stopped:
            return rest
        self.text += self._held
        rest, self._held = rest + self._held, ""
        return rest

    def _grow(self, more: str) -> str:
        self._held += more
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = self._begun()
            certain, self._held = (
                self._held[: len(self._held) - keep],
                self._held[-keep:] * (keep > 0),
            )
        self.text += certain
        return certain

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
