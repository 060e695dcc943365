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
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from qwen_scope_lens.tables import printable

__all__ = ["plain", "shown_safely", "silenced"]


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
