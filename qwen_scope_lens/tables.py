"""A table once: as aligned text, CSV, JSON rows, HTML cells, and a pandas frame.

What the numbers mean is the business of the room that made them; here is only how a table is shown.
Text for terminals has no control characters, so a label from elsewhere cannot move the cursor.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.files import whole_file

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "plain", "printable", "shown", "width_of"]

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Column names and rows of equal length. Cells are strings, numbers, booleans or None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
        return cls(tuple(columns), tuple(tuple(row) for row in rows))

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]]) -> Table:
        """From rows as mappings; the columns are those of all of them, in order of appearance."""
        columns = list(dict.fromkeys(name for record in records for name in record))
        return cls.of(columns, ([record.get(name) for name in columns] for record in records))

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells for {len(self.columns)} columns")

    def text(self, most: int | None = None) -> str:
        """Aligned for a terminal: columns of numbers to the right, all others to the left."""
        rows = self.rows if most is None else self.rows[:most]
        right = [
            bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(self.columns))
        ]
        cells = [[printable(name) for name in self.columns]]
        cells += [[printable(shown(cell)) for cell in row] for row in rows]
        widths = [max(width_of(line[i]) for line in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                _pad(cell, width, to_right)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in cells
        ]
        if len(self.rows) > len(rows):
            lines.append(f"... and {len(self.rows) - len(rows):,} more")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """Rows as mappings of what JSON has: numbers that are not finite become None."""
        return [dict(zip(self.columns, map(plain, row), strict=True)) for row in self.rows]

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return out.getvalue()

    def save_csv(self, path: Path) -> None:
        with whole_file(path) as partial:
            partial.write_text(self.csv(), encoding="utf-8", newline="")

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(self.columns))

    def _repr_html_(self) -> str:
        """For notebooks."""
        from qwen_scope_lens.pages import table_html

        return table_html(self.columns, self.rows)


def shown(cell: Any) -> str:
    """A cell as people read it: floats to three significant places, None as a dash."""
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return (
            MISSING
            if math.isnan(cell)
            else f"{cell:.3f}"
            if 0.001 <= abs(cell) < 1000 or cell == 0
            else f"{cell:.3g}"
        )
    return str(cell)


_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u202a-\u202e\u2066-\u2069"  # which turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # line breaks, and halves of characters
)
_NO_WIDTH = ("Cf", "Mn", "Me")  # Unicode's categories of marks and of invisible signs


def printable(text: object, keep: str = "") -> str:
    """Text for a terminal: characters that would command it are written out, such as `\\x1b`.

    Those in `keep` stay, such as tab and newline in a text of several lines.
    """
    return _COMMANDS.sub(
        lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text)
    )


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes: two for wide characters, none for marks."""
    return sum(
        0
        if unicodedata.combining(char) or unicodedata.category(char) in _NO_WIDTH
        else 2
        if unicodedata.east_asian_width(char) in "WF"
        else 1
        for char in text
    )


def plain(value: Any) -> Any:
    """What JSON has for a value: dataclasses and arrays as lists and mappings, NaN as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):  # a NumPy array or number
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _is_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))


def _pad(cell: str, width: int, to_right: bool) -> str:
    space = " " * (width - width_of(cell))
    return space + cell if to_right else cell + space
