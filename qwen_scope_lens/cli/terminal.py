"""What a terminal is shown: no text from elsewhere can command it.

Labels, texts, names of files and of models may come from anywhere, and an escape sequence in one
of them can recolour, overwrite or retitle what a person sees. On a terminal such characters are
written out, as `\\x1b`; JSON and CSV in files and pipes stay exact.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from qwen_scope_lens.errors import BadText
from qwen_scope_lens.pages import Shaded
from qwen_scope_lens.tables import printable, width_of

__all__ = ["given_text", "has_colour", "plain", "print_shaded", "shown_safely", "silenced"]

SHADES = (230, 222, 215, 208, 202)
"""Numbers of a terminal's 256 colours, from weak to strong; the text on them is black (16)."""


def plain(text: object) -> str:
    """The text with control characters written out; tabs and newlines stay."""
    return printable(text, keep="\t\n")


class _Plain:
    """A terminal that is written to through `plain`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(plain(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


@contextlib.contextmanager
def shown_safely() -> Iterator[None]:
    """While a verb runs, a terminal gets no commands, and no character that the terminal's encoding
    lacks stops the output."""
    out = sys.stdout
    if getattr(out, "errors", None) == "strict" and hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")
    if not out.isatty():
        yield
        return
    sys.stdout = _Plain(out)  # a TextIO by `__getattr__`
    try:
        yield
    finally:
        sys.stdout = out


def given_text(word: str) -> str:
    """A text of the command line, where `-` is the standard input."""
    if word != "-":
        return word
    try:
        return sys.stdin.buffer.read().decode("utf-8") if sys.stdin is not None else ""
    except ValueError as error:
        raise BadText(f"the standard input is not UTF-8 text: {error}") from error


def has_colour() -> bool:
    """Whether the output is a terminal that shows colours, and nobody forbids them (NO_COLOR)."""
    forbidden = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return sys.stdout.isatty() and not forbidden


def print_shaded(name: str, pieces: Sequence[Shaded], width: int) -> None:
    """One line: a name, and as much of the text around its strongest piece as `width` has room for.

    The colours are the only commands that a terminal gets here: texts go through `printable`.
    """
    texts = [printable(piece.text) for piece in pieces]
    name = printable(name)
    line = [f"{name}  "]
    for i in _around_strongest(pieces, texts, width - width_of(name) - 2):
        share = pieces[i].share
        if share:
            colour = SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))]
            line.append(f"\x1b[38;5;16;48;5;{colour}m{texts[i]}\x1b[0m")
        else:
            line.append(texts[i] if share is not None else f"\x1b[2m{texts[i]}\x1b[0m")
    out = sys.stdout._out if isinstance(sys.stdout, _Plain) else sys.stdout
    out.write("".join(line) + "\n")


def _around_strongest(pieces: Sequence[Shaded], texts: Sequence[str], room: int) -> range:
    first = last = max(range(len(pieces)), key=lambda i: pieces[i].share or 0.0)
    room -= width_of(texts[first])
    while True:
        sides = {first - 1: True, last + 1: False}
        fits = [i for i in sides if 0 <= i < len(texts) and width_of(texts[i]) <= room]
        if not fits:
            return range(first, last + 1)
        first, last = min(first, *fits), max(last, *fits)
        room -= sum(width_of(texts[i]) for i in fits)


@contextlib.contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """With `quiet`, nothing that anybody writes to the error stream is shown: progress bars,
    remarks, warnings, logs. Errors are printed after this block has ended."""
    if quiet:
        with contextlib.redirect_stderr(_nowhere()):
            yield
    else:
        yield


@functools.cache
def _nowhere() -> TextIO:
    """One for the whole process, because handlers of loggers keep the stream."""
    return open(os.devnull, "w", encoding="utf-8")
