"""The tokens behind some bytes of a stream, where it tells the last of them only.

llama.cpp's server streams whole characters. Where a character is spread over several tokens, a
chunk has the text of all of them and the number of the last. The others are those that spell the
bytes before it, each of which left a character unfinished. Nearly always there is one way.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope_lens.models.token_text import Vocabulary

__all__ = ["Speller"]

MOST_BYTES = 64
"""Of the tokens that are looked for: tokens that end in an unfinished character are short."""


class Speller:
    """Finds tokens by their bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens: dict[bytes, int] = {}
        for token in reversed(range(len(vocabulary))):
            found = vocabulary.bytes_of(token)
            if found:
                self._tokens[found] = token

    def tokens(self, spelled: bytes, count: int) -> list[int] | None:
        """`count` tokens that spell these bytes, or None. Of several ways, the longest first."""
        if len(spelled) > MOST_BYTES or count > len(spelled):
            return None
        return self._found(spelled, count)

    def _found(self, spelled: bytes, count: int) -> list[int] | None:
        if count == 0:
            return [] if not spelled else None
        sizes: Sequence[int] = range(len(spelled) - count + 1, 0, -1)
        for size in sizes if count > 1 else [len(spelled)]:
            head, rest = spelled[:size], spelled[size:]
            token = self._tokens.get(head)
            if token is None or not _unfinished(head):
                continue
            after = self._found(rest, count - 1)
            if after is not None:
                return [token, *after]
        return None


def _unfinished(spelled: bytes) -> bool:
    """Whether bytes leave a character unfinished, wherever the first of them belongs to."""
    at = len(spelled) - 1
    while at >= 0 and spelled[at] & 0xC0 == 0x80:
        at -= 1
    if at < 0:
        return True  # the beginning is in an earlier token
    lead, have = spelled[at], len(spelled) - at
    need = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    return have < need
