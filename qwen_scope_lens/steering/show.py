"""Texts that grow side by side in a terminal, a line as soon as all columns have it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

__all__ = ["SideBySide", "display_width", "printable", "wrap"]

GAP = " | "


class SideBySide:
    """Columns of text; `update` as often as they grow, `finish` at the end."""

    def __init__(self, names: Sequence[str], width: int, write: Callable[[str], object]) -> None:
        self.width = max(16, (width - len(GAP) * (len(names) - 1)) // len(names))
        self._write = write
        self._shown = 0
        self._line(names)
        self._line(["-" * self.width] * len(names))

    def update(self, texts: Sequence[str]) -> None:
        """The texts so far. The last line of a column may still grow, so it waits."""
        columns = [wrap(text, self.width)[:-1] for text in texts]
        self._print(columns, min(map(len, columns)))

    def finish(self, texts: Sequence[str]) -> None:
        columns = [wrap(text, self.width) for text in texts]
        self._print(columns, max(map(len, columns)))

    def _print(self, columns: Sequence[Sequence[str]], ready: int) -> None:
        while self._shown < ready:
            self._line([c[self._shown] if self._shown < len(c) else "" for c in columns])
            self._shown += 1

    def _line(self, cells: Sequence[str]) -> None:
        padded = [cell + " " * (self.width - display_width(cell)) for cell in cells]
        self._write(GAP.join(padded).rstrip() + "\n")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces where there are some."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line, used = "", 0
        for char in printable(paragraph):
            size = display_width(char)
            if used + size > width:
                head, space, tail = line.rpartition(" ")
                if space and char != " " and head.strip():
                    lines.append(head)
                    line = tail
                else:
                    lines.append(line.rstrip())
                    line = ""
                    char = "" if char == " " else char
                used = display_width(line)
                size = display_width(char)
            line += char
            used += size
        lines.append(line)
    return lines


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal: two for wide characters, none for marks."""
    return sum(
        0
        if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Mn", "Me")
        else 2
        if unicodedata.east_asian_width(char) in "WF"
        else 1
        for char in text
    )


def printable(text: str) -> str:
    """Without control characters, which could move the cursor; tabs as spaces."""
    return "".join(
        char
        for char in text.replace("\t", "    ")
        if char == "\n" or unicodedata.category(char) != "Cc"
    )
