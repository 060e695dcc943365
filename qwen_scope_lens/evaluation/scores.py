"""Results of a panel of models, from a table.

Two shapes, told apart by their columns. *Wide*: `model` and one column of scores per benchmark;
enough for performance similarity. *Long*: `model, benchmark, item, correct`, one row per result;
from it also the ground truth of redundancy. CSV, JSON Lines or Parquet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadFile, TooLittleData, UnknownName

__all__ = ["Scores", "read_scores"]

LONG = ("model", "benchmark", "item", "correct")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of models on benchmarks, and where known every single result."""

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    table: np.ndarray  # [models, benchmarks]
    results: dict[str, np.ndarray]  # benchmark -> [models, items]; empty for a wide table

    def only(self, names: Sequence[str]) -> Scores:
        """The same for these benchmarks, in this order."""
        missing = [name for name in names if name not in self.benchmarks]
        if missing:
            raise UnknownName(
                f"no scores of {', '.join(missing)}: the table has {', '.join(self.benchmarks)}"
            )
        columns = [self.benchmarks.index(name) for name in names]
        results = {name: self.results[name] for name in names if name in self.results}
        return Scores(self.models, tuple(names), self.table[:, columns], results)


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """A wide or a long table of results."""
    place = Path(path).expanduser()
    table = _read(place)
    columns = table.column_names
    if "model" not in columns or len(columns) < 2:
        raise BadFile(
            f"{place} has the columns {', '.join(columns)}: expected model and one column per"
            f" benchmark, or {', '.join(LONG)}"
        )
    if table.num_rows == 0:
        raise TooLittleData(f"{place} has no rows")
    return _long(place, table) if set(LONG) <= set(columns) else _wide(place, table)


def _wide(place: Path, table: Any) -> Scores:
    models = [str(m) for m in table["model"].to_pylist()]
    _no_repeats(place, models)
    names = [name for name in table.column_names if name != "model"]
    columns = [_numbers(place, name, table[name]) for name in names]
    return Scores(tuple(models), tuple(names), np.stack(columns, axis=1), {})


def _long(place: Path, table: Any) -> Scores:
    correct = _numbers(place, "correct", table["correct"])
    cells = [np.array([str(v) for v in table[c].to_pylist()]) for c in LONG[:3]]
    models, model = np.unique(cells[0], return_inverse=True)
    names = list(dict.fromkeys(cells[1].tolist()))
    results = {}
    for name in names:
        rows = cells[1] == name
        items, item = np.unique(cells[2][rows], return_inverse=True)
        matrix = np.full((len(models), len(items)), np.nan)
        matrix[model[rows], item] = correct[rows]
        if int(rows.sum()) != matrix.size or np.isnan(matrix).any():
            raise BadFile(
                f"{place}: {name} has {int(rows.sum())} results; {len(models)} models on"
                f" {len(items)} items make {matrix.size}. Every model needs one result for every"
                " item, and no item may come twice"
            )
        results[name] = matrix
    table_of_means = np.stack([results[name].mean(1) for name in names], axis=1)
    return Scores(tuple(map(str, models)), tuple(names), table_of_means, results)


def _read(place: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {
        ".csv": pa.csv.read_csv,
        ".jsonl": pa.json.read_json,
        ".ndjson": pa.json.read_json,
        ".parquet": pa.parquet.read_table,
    }
    if place.suffix.lower() not in readers:
        raise BadFile(f"{place}: expected a table that ends in {', '.join(readers)}")
    if not place.is_file():
        raise BadFile(f"{place} does not exist")
    try:
        return readers[place.suffix.lower()](place)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{place} cannot be read as a table: {error}") from error


def _numbers(place: Path, name: str, column: Any) -> np.ndarray:
    try:
        values = np.array([float("nan") if v is None else float(v) for v in column.to_pylist()])
    except (TypeError, ValueError) as error:
        raise BadFile(f"{place}: column {name} has something that is no number: {error}") from error
    if not np.isfinite(values).all():
        missing = int((~np.isfinite(values)).sum())
        raise BadFile(f"{place}: column {name} lacks a number in {missing} of {len(values)} rows")
    return values


def _no_repeats(place: Path, models: Sequence[str]) -> None:
    twice = sorted({m for m in models if models.count(m) > 1})
    if twice:
        raise BadFile(f"{place} has more than one row for {', '.join(twice)}")
