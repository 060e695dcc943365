"""Results of a panel of models, and how well random subsets rank the models as the whole does.

A table of results (CSV, JSON Lines or Parquet) has one of two shapes, recognised by its columns.
*Wide*: `model` and one column of scores per benchmark, which is enough for performance similarity.
*Long*: `model, benchmark, item, correct` with one row per result, which also gives R.

Equations 4-6: Kendall's tau between the models' accuracies on D and on a random subset S of n
items, its mean over subsets (tau_n), and R, the mean of tau_n over n = 1..N. R needs the result of
every model on every item, which R-hat (`coverage.py`) does not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadFile, StoreMismatch, TooLittleData, UnknownName
from qwen_scope_lens.stats import Interval, centred

__all__ = ["Agreement", "Scores", "agreement", "ranking_curve", "read_scores"]

MOST = 1e100
"""Larger scores would overflow in a correlation."""
LONG = ("model", "benchmark", "item", "correct")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of models on benchmarks, and every single result where it is known."""

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    table: np.ndarray  # [models, benchmarks]
    results: dict[str, np.ndarray]  # benchmark -> [models, items]; empty for a wide table
    items: dict[str, tuple[str, ...]] = field(default_factory=dict)  # benchmark -> known item ids

    def only(self, names: Sequence[str]) -> Scores:
        """The scores of these benchmarks only, in this order."""
        missing = [name for name in names if name not in self.benchmarks]
        if missing:
            raise UnknownName(
                f"the table has no scores of {', '.join(missing)}: it has"
                f" {', '.join(self.benchmarks)}"
            )
        columns = [self.benchmarks.index(name) for name in names]
        results = {name: self.results[name] for name in names if name in self.results}
        items = {name: self.items[name] for name in names if name in self.items}
        return Scores(self.models, tuple(names), self.table[:, columns], results, items)

    def matched(self, keys: Mapping[str, Sequence[str]]) -> Scores:
        """The results on these items only; `keys` is `{benchmark: ids of the extracted items}`.

        Scores become means over these items. Benchmarks that `keys` does not name stay unchanged,
        and so do benchmarks of which only the scores are known.
        """
        table, results, items = self.table.copy(), dict(self.results), dict(self.items)
        for name, wanted in keys.items():
            if name not in results:
                continue
            columns = _columns_of(name, wanted, results[name].shape[1], items.get(name))
            results[name] = results[name][:, columns]
            if name in items:
                items[name] = tuple(items[name][i] for i in columns)
            table[:, self.benchmarks.index(name)] = results[name].mean(1)
        return Scores(self.models, self.benchmarks, table, results, items)


def _columns_of(
    name: str, wanted: Sequence[str], n_results: int, ids: Sequence[str] | None
) -> list[int]:
    """The columns of results that belong to a footprint's items; raises if one has no result."""
    if ids is None:
        if n_results != len(wanted):
            raise StoreMismatch(
                f"{name}: the footprint has {len(wanted)} items and the scores {n_results}, and"
                " without item ids nothing says which belong together. Score the extracted items,"
                " extract the scored items, or add item ids to the scores"
            )
        return list(range(n_results))
    place = {item: column for column, item in enumerate(ids)}
    columns: dict[int, None] = {}
    missing = []
    for key in wanted:
        # If the choices of a question have their own prompts, it is several items with one result.
        item = key if key in place else key.rpartition("/")[0]
        if item in place:
            columns[place[item]] = None
        else:
            missing.append(key)
    if missing:
        raise StoreMismatch(
            f"{name}: the footprint has {len(wanted)} items and the scores {n_results};"
            f" {len(missing)} items of the footprint have no result. The first of them is"
            f" {missing[0]!r} (the scores have {', '.join(map(repr, list(ids)[:3]))}, ..). Score"
            " the extracted items, extract the scored items (for example with --limit and --seed),"
            " or give both the same ids"
        )
    return sorted(columns)


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read a wide or a long table of results."""
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
    models = _names(place, "model", table["model"])
    _no_repeats(place, models)
    names = [name for name in table.column_names if name != "model"]
    columns = [_numbers(place, name, table[name]) for name in names]
    return Scores(tuple(models), tuple(names), np.stack(columns, axis=1), {})


def _long(place: Path, table: Any) -> Scores:
    correct = _numbers(place, "correct", table["correct"])
    cells = [np.array(_names(place, c, table[c])) for c in LONG[:3]]
    models, model = np.unique(cells[0], return_inverse=True)
    names = list(dict.fromkeys(cells[1].tolist()))
    results, ids = {}, {}
    for name in names:
        rows = cells[1] == name
        items, item = np.unique(cells[2][rows], return_inverse=True)
        matrix = np.full((len(models), len(items)), np.nan)
        matrix[model[rows], item] = correct[rows]
        if int(rows.sum()) != matrix.size or np.isnan(matrix).any():
            raise BadFile(
                f"{place}: {name} has {int(rows.sum())} results; {len(models)} models on"
                f" {len(items)} items make {matrix.size}. Every model needs one result for every"
                " item, and each item may occur once only"
            )
        results[name] = matrix
        ids[name] = tuple(map(str, items))
    table_of_means = np.stack([results[name].mean(1) for name in names], axis=1)
    return Scores(tuple(map(str, models)), tuple(names), table_of_means, results, ids)


def _read(place: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    # Ids are names, not numbers: 007 is not 7.
    as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(LONG[:3], pa.string()))
    readers = {
        ".csv": partial(pa.csv.read_csv, convert_options=as_text),
        ".jsonl": pa.json.read_json,
        ".ndjson": pa.json.read_json,
        ".parquet": pa.parquet.read_table,
    }
    if place.suffix.lower() not in readers:
        raise BadFile(f"{place}: expected a table that ends in {', '.join(readers)}")
    if not place.is_file():
        raise BadFile(f"{place} does not exist")
    try:
        if place.suffix.lower() in (".jsonl", ".ndjson"):
            _only_objects(place)
        table = readers[place.suffix.lower()](place)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise BadFile(f"{place} cannot be read as a table: {error}") from error
    twice = sorted({c for c in names if names.count(c) > 1})
    if twice:
        raise BadFile(
            f"{place} has more than one column {', '.join(twice)}: expected different names"
        )
    return table


def _only_objects(place: Path) -> None:
    """Raise if a line does not begin with `{`: pyarrow's reader may crash on such lines."""
    with place.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith(b"{"):
                raise BadFile(f"{place}, line {number}: expected a JSON object with columns")


def _names(place: Path, name: str, column: Any) -> list[str]:
    """Names of models, benchmarks or items as strings; 3 and 3.0 are the same name."""
    values = column.to_pylist()
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise BadFile(f"{place}: column {name} has no name in {missing} of {len(values)} rows")
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]


def _numbers(place: Path, name: str, column: Any) -> np.ndarray:
    try:
        values = np.array([float("nan") if v is None else float(v) for v in column.to_pylist()])
    except (TypeError, ValueError, OverflowError) as error:
        what = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}..."
        raise BadFile(f"{place}: column {name} has a value that is not a number: {what}") from error
    if not np.isfinite(values).all():
        missing = int((~np.isfinite(values)).sum())
        raise BadFile(f"{place}: column {name} has no number in {missing} of {len(values)} rows")
    if len(values) and np.abs(values).max() > MOST:
        raise BadFile(
            f"{place}: column {name} has {np.abs(values).max():g}: expected scores up to {MOST:g}"
        )
    return values


def _no_repeats(place: Path, models: Sequence[str]) -> None:
    twice = sorted({m for m in models if models.count(m) > 1})
    if twice:
        raise BadFile(f"{place} has more than one row for {', '.join(twice)}")


PERMUTATIONS = 100
DRAWS = 100
ALL_SIZES = 200
"""Up to this many items every subset size is computed. For more items a grid of about this many
sizes is computed, and values between them are interpolated."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well random subsets of a benchmark rank the models as the whole benchmark does.

    Kendall's tau at each number of items (the paper's tau_n), and its mean over them (R).
    """

    name: str
    n_items: int
    n_models: int
    sizes: np.ndarray  # [points]
    tau: np.ndarray  # [points]
    r: Interval  # equation 6; items are resampled, models are not
    accuracy: tuple[float, float]  # lowest and highest accuracy in the panel


def agreement(
    name: str,
    correct: np.ndarray | Sequence[Sequence[float]],
    permutations: int = PERMUTATIONS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Equations 4-6 on results `[models, items]` (0 or 1, or any score per item)."""
    matrix = _checked(name, correct)
    n_models, n_items = matrix.shape
    sizes = _sizes(n_items)
    rng = np.random.default_rng(seed)
    tau = ranking_curve(matrix, sizes, permutations, rng)
    value = _mean_over_sizes(sizes, tau)
    few = max(1, permutations // 10)
    drawn = np.full(draws, np.nan)
    for i in range(draws):
        again = matrix[:, rng.integers(0, n_items, n_items)]
        if np.ptp(again.mean(1)) > 0:
            drawn[i] = _mean_over_sizes(sizes, ranking_curve(again, sizes, few, rng))
    accuracy = matrix.mean(1)
    span = (float(accuracy.min()), float(accuracy.max()))
    interval = centred(value, drawn, -1.0, 1.0)
    return Agreement(name, n_items, n_models, sizes, tau, interval, span)


def ranking_curve(
    correct: np.ndarray, sizes: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """tau_n at each size, as the mean over random subsets. `[models, items] -> [sizes]`

    The first n items of a random permutation are a random subset of n items, so each permutation
    serves all sizes. Tau is tau-b, as in SciPy; it counts as 0 on a subset on which all models tie.
    """
    first, second = np.triu_indices(len(correct), 1)
    whole_numbers = np.array_equal(correct, np.rint(correct))
    values: np.ndarray = correct.astype(np.int32 if whole_numbers else np.float64)
    differences: np.ndarray = np.subtract(values[first], values[second])  # [pairs, items]
    slack = 0 if whole_numbers else 1e-9 * max(1.0, float(np.abs(correct).max()))

    def signs(sums: np.ndarray) -> np.ndarray:
        return np.where(np.abs(sums) <= slack, 0, np.sign(sums)).astype(np.float32)

    whole = signs(differences.sum(1))  # [pairs]
    strict = float(np.abs(whole).sum())
    total = np.zeros(len(sizes))
    for _ in range(permutations):
        order = rng.permutation(correct.shape[1])
        part = signs(np.cumsum(differences[:, order], axis=1)[:, sizes - 1])
        decided = np.abs(part).sum(0)
        agreed = whole @ part
        norm = np.sqrt(strict * decided)
        total += np.divide(agreed, norm, out=np.zeros(len(sizes)), where=norm > 0)
    return total / permutations


def _sizes(n_items: int) -> np.ndarray:
    if n_items <= ALL_SIZES:
        return np.arange(1, n_items + 1)
    return np.unique(np.geomspace(1, n_items, ALL_SIZES).round().astype(np.int64))


def _mean_over_sizes(sizes: np.ndarray, values: np.ndarray) -> float:
    """The mean over n = 1..N of a curve that is interpolated linearly between `sizes`."""
    every = np.arange(1, int(sizes[-1]) + 1)
    return float(np.interp(every, sizes, values).mean())


def _checked(name: str, correct: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    matrix = np.asarray(correct, dtype=np.float64)
    if matrix.ndim != 2:
        raise BadFile(
            f"{name}: the results have {matrix.ndim} dimensions; expected [models, items], one"
            " number per model and item"
        )
    n_models, n_items = matrix.shape
    if n_models < 2 or n_items < 2:
        raise TooLittleData(
            f"{name}: {n_models} models on {n_items} items. A ranking needs at least 2 models, and"
            " a subset needs at least 2 items"
        )
    if not np.isfinite(matrix).all():
        raise BadFile(
            f"{name}: {int((~np.isfinite(matrix)).sum())} of {matrix.size} results are missing or"
            " not finite: every model must be scored on every item"
        )
    if np.ptp(matrix.mean(1)) == 0:
        raise TooLittleData(
            f"{name}: all {n_models} models have accuracy {matrix[0].mean():.3f}, so they have no"
            " ranking. Use a panel whose models differ, or leave this benchmark out"
        )
    return matrix
