"""What a terminal is shown: texts of others' without the characters that command a terminal.

Labels, texts, names of files and of models may come from anywhere, and an escape sequence in one of
them can recolour, overwrite or retitle what a person sees. Tables and messages show such characters
as `\\x1b`; JSON and CSV in files and pipes stay exact.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["plain", "shown_safely"]

_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u202a-\u202e\u2066-\u2069"  # which turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"
)


def plain(text: object) -> str:
    """The text with control characters written out; tabs and newlines stay."""
    return _COMMANDS.sub(_written_out, str(text))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Plain:
    """A terminal that is written to through `plain`."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(plain(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


@contextlib.contextmanager
def shown_safely() -> Iterator[None]:
    """For the time of a verb: a terminal gets no commands, and no text stops the output because
    an encoding lacks a character."""
    out = sys.stdout
    if getattr(out, "errors", None) == "strict" and hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")
    if not out.isatty():
        yield
        return
    sys.stdout = _Plain(out)
    try:
        yield
    finally:
        sys.stdout = out
