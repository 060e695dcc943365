"""A table once: as aligned text, CSV, JSON rows, HTML cells, and a pandas frame.

What the numbers mean is the business of the room that made them; here is only how a table is shown.
Text for terminals has no control characters, so a label from elsewhere cannot move the cursor.
Whatever has a table inherits `View`: it then prints short, shows as HTML in notebooks, and turns
into a pandas frame.
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.pages import lines_html, printable, table_html

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "View", "plain", "printable", "shown", "width_of"]

MISSING = "–"
FEW, SOME = 5, 20
"""How many rows `repr` and a notebook show."""


@dataclass(frozen=True, repr=False)
class Table:
    """Column names and rows of equal length. Cells are strings, numbers, booleans or None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    above: tuple[str, ...] = ()  # lines that text and HTML show before the table, and after it
    below: tuple[str, ...] = ()
    more: int = 0  # rows that whoever made the table left out
    formats: Mapping[str, str] = field(default_factory=dict)  # column -> format of its floats
    heat: tuple[str, ...] = ()  # columns of numbers that HTML shades, all on one scale from 0

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[Any]], **more: Any) -> Table:
        return cls(tuple(columns), tuple(tuple(row) for row in rows), **more)

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
        formats = [self.formats.get(name, "") for name in self.columns]
        cells = [[printable(name) for name in self.columns]]
        cells += [
            [printable(shown(cell, how)) for cell, how in zip(row, formats, strict=True)]
            for row in rows
        ]
        widths = [max(width_of(line[i]) for line in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                _pad(cell, width, to_right)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in cells
        ]
        if left_out := self.more + len(self.rows) - len(rows):
            lines.append(f"... and {left_out:,} more")
        around = [[printable(line) for line in part] for part in (self.above, self.below)]
        return "\n".join([*around[0], *lines, *around[1]])

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return replace(self, below=()).text(FEW)

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
        """For notebooks: the first rows, with the lines around them."""
        table = table_html(self.columns, self.rows[:SOME], self.formats, self.heat)
        left_out = self.more + max(0, len(self.rows) - SOME)
        tail = [f"... and {left_out:,} more"] if left_out else []
        return lines_html(self.above) + table + lines_html([*tail, *self.below])


class View:
    """What has a table is shown as that table: a few rows by `repr`, more of them in a notebook,
    and all of them by `to_pandas`. A dataclass that inherits this needs `repr=False`."""

    def table(self, most: int | None = None) -> Table:
        """The first `most` rows; by default all of them."""
        raise NotImplementedError

    def to_pandas(self) -> pd.DataFrame:
        return self.table().to_pandas()

    def __repr__(self) -> str:
        table = self.table(FEW)
        return f"{type(self).__name__}{': ' if table.above else chr(10)}{table!r}"

    def _repr_html_(self) -> str:
        return self.table(SOME)._repr_html_()


def shown(cell: Any, how: str = "") -> str:
    """A cell as people read it.

    A float from 0.001 to 1000 has three decimals, any other has three significant digits, unless
    `how` gives a format. None and NaN are a dash, and a bool is yes or no.
    """
    if how and isinstance(cell, float) and not math.isnan(cell):
        return format(cell, how)
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


_NO_WIDTH = ("Cf", "Mn", "Me")  # Unicode's categories of marks and of invisible signs


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


def _is_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))


def _pad(cell: str, width: int, to_right: bool) -> str:
    space = " " * (width - width_of(cell))
    return space + cell if to_right else cell + space
