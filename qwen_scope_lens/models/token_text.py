"""Show tokens as text: tokens that share a character are joined, incomplete ones become bytes.

Qwen's tokens are byte strings. A character that is not in the vocabulary is spread over several
tokens, none of which is text by itself. In running text, such tokens are joined into one piece. By
themselves, bytes that are not a whole character are written as `<0xE4>`, as in other tools.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwen_scope_lens.errors import WrongTokenizer
from qwen_scope_lens.models.checkpoint import Tokenizer

__all__ = ["Piece", "Vocabulary", "readable"]

MOST_JOINED = 4
"""The largest number of tokens in a piece: a character has at most four bytes."""


@dataclass(frozen=True)
class Piece:
    """A unit of running text: usually one token, or several that share a character."""

    text: str
    tokens: int


class Vocabulary:
    """The byte string of each token of a byte-level tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in str(backend.decoder):
            raise WrongTokenizer(
                f"{type(tokenizer).__name__} is not a fast byte-level tokenizer, as Qwen's are:"
                " load the tokenizer of the model's own repository"
            )
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._bytes)

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        known = len(self._tokenizer)
        added = {
            int(token): str(entry.content).encode()
            for token, entry in self._tokenizer.added_tokens_decoder.items()
        }
        names = self._tokenizer.convert_ids_to_tokens(list(range(known)))
        return [added.get(i, _to_bytes(name)) for i, name in enumerate(names)]

    @cached_property
    def continues(self) -> np.ndarray:
        """Which tokens begin in the middle of a character. bool `[n_tokens]`"""
        return np.array([b is not None and 0x80 <= (b + b" ")[0] < 0xC0 for b in self._bytes])

    @cached_property
    def _whole(self) -> list[str | None]:
        """The text of each token, or None if it is not whole characters."""
        return [None if found is None else _decoded(found) for found in self._bytes]

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token, or None for an id that the tokenizer never produces."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    def text(self, token: int) -> str:
        """The text of one token by itself, as for a list of tokens."""
        found = self.bytes_of(int(token))
        return f"<unused {token}>" if found is None else readable(found)

    def pieces(self, tokens: Sequence[int]) -> list[Piece]:
        """Tokens as running text. Tokens that share a character are one piece."""
        alone = [self._whole[t] if 0 <= t < len(self._whole) else None for t in tokens]
        if None not in alone:  # the usual case; this way is much faster
            return [Piece(text, 1) for text in alone if text is not None]
        out: list[Piece] = []
        waiting: list[int] = []
        held = b""
        for token in tokens:
            more = self.bytes_of(int(token))
            if more is None or not _may_follow(held, more):
                out += [Piece(self.text(t), 1) for t in waiting]
                waiting, held = [], b""
            if more is None:
                out.append(Piece(self.text(token), 1))
                continue
            waiting.append(int(token))
            held += more
            whole = _decoded(held)
            if whole is not None:
                out.append(Piece(whole, len(waiting)))
            elif _is_begun(held) and len(waiting) < MOST_JOINED:
                continue
            else:
                out += [Piece(self.text(t), 1) for t in waiting]
            waiting, held = [], b""
        return out + [Piece(self.text(t), 1) for t in waiting]


def readable(found: bytes) -> str:
    """Bytes as text. Bytes that are not a whole character are written as `<0xE4>`."""
    return found.decode("utf-8", errors="qsl-bytes")


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(f"<0x{byte:02X}>" for byte in bad), error.end


codecs.register_error("qsl-bytes", _show_bytes)


def _decoded(found: bytes) -> str | None:
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_begun(found: bytes) -> bool:
    """Whether the bytes are text except for a last character that is not complete yet."""
    try:
        found.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _may_follow(held: bytes, more: bytes) -> bool:
    """Whether the next token's bytes can continue the bytes so far."""
    return not held or _decoded(held + more) is not None or _is_begun(held + more)


def _letters() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable bytes are themselves, others begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()


def _to_bytes(name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        return bytes(_LETTERS[letter] for letter in name)
    except KeyError:  # an added token is plain text
        return name.encode()
