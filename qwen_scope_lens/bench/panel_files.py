"""Results of a panel in the forms in which others publish them.

`read_panel` takes a table (`panel.py` reads it), a JSON file `{model: {item: right or wrong}}`, or
a folder of what lm-eval writes with `--log_samples`: `MODEL/samples_TASK_DATE.jsonl`. All become
`Scores` over exactly the items that were extracted.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.bench.panel import Scores, read_scores
from qwen_scope_lens.errors import BadFile, TooLittleData
from qwen_scope_lens.files import gunzip, open_regular
from qwen_scope_lens.stores.corpus import read_rows

__all__ = ["MOST_MISSING", "read_panel"]

MOST_MISSING = 0.01
"""A model that lacks more than this share of the items is left out; else the items are."""

METRICS = ("exact_match", "acc", "pass@1", "pass_at_1")
"""The metrics of lm-eval that say right or wrong of one item, in order of preference."""

Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # model -> benchmark -> item -> score


def read_panel(
    path: str | Path,
    keys: Mapping[str, Sequence[str]],
    most_missing: float = MOST_MISSING,
    say: Callable[[str], None] = lambda line: None,
) -> Scores:
    """Scores on these items, `keys` = {benchmark: ids}; of a table, all of its scores.

    A model that lacks more than `most_missing` of the items is left out, and so is every item that
    one of the other models lacks. Both are said. The items that stay are in `Scores.items`.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _complete(place, _samples(place), keys, most_missing, say)
    if place.name.lower().endswith((".json", ".json.gz")):
        return _complete(place, _per_item(place, keys), keys, most_missing, say)
    return read_scores(place)


def _per_item(place: Path, keys: Mapping[str, Sequence[str]]) -> Results:
    """`{model: {item: right}}`; the ids say to which benchmark an item belongs."""
    try:
        with open_regular(place) as file:
            data = file.read()
        whole = gunzip(data) if place.suffix.lower() == ".gz" else data
        content = json.loads(whole)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise BadFile(f"{place} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise BadFile(f"{place}: expected {{model: {{item: right or wrong}}}}")
    return {
        model: {
            name: {item: _number(place, row[item]) for item in items if item in row}
            for name, items in keys.items()
        }
        for model, row in content.items()
    }


def _samples(folder: Path) -> Results:
    """The newest `samples_TASK_DATE.jsonl` of every task of every model.

    An item is called as `prompts.py` calls it: its number in the task, and with the task's name
    before it if the benchmark is a group. Both names are given, so that either is found.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*/samples_*.jsonl")):  # by date: a newer file replaces an older
        task = re.sub(r"_\d{4}-\d{2}-\d{2}T[\d.:-]+$", "", path.stem.removeprefix("samples_"))
        rows = found.setdefault(path.parent.name, {})
        mine: dict[str, float] = {}
        for where, row in read_rows(path):
            metric = next((name for name in METRICS if name in row), None)
            if metric is None or "doc_id" not in row:
                raise BadFile(
                    f"{where} has no doc_id and {' or '.join(METRICS)}: expected what lm-eval"
                    " writes with --log_samples"
                )
            mine[str(row["doc_id"])] = _number(where, row[metric])
        rows[task] = mine
    if not found:
        raise BadFile(
            f"{folder} has no MODEL/samples_TASK_DATE.jsonl: lm-eval writes them with --log_samples"
            " --output_path"
        )
    return found


def _complete(
    place: Path,
    results: Results,
    keys: Mapping[str, Sequence[str]],
    most_missing: float,
    say: Callable[[str], None],
) -> Scores:
    """The models and items without a hole."""
    keys = {
        name: list(dict.fromkeys(_item(results, name, key) for key in mine))
        for name, mine in keys.items()
    }
    wanted = sum(map(len, keys.values()))
    held = {
        model: {
            name: {key: score for key in items if (score := _of(rows, name, key)) is not None}
            for name, items in keys.items()
        }
        for model, rows in results.items()
    }
    models = []
    for model, rows in held.items():
        missing = wanted - sum(map(len, rows.values()))
        if missing > most_missing * wanted:
            say(f"{model} lacks {missing:,} of {wanted:,} items and is left out of the panel")
        else:
            models.append(model)
    if len(models) < 3:
        raise TooLittleData(
            f"{place} has {len(models)} models with results on these items, and 3 are needed."
            f" The first items are {_first(keys)}: are these the ids of the results?"
        )
    items = {
        name: tuple(key for key in mine if all(key in held[model][name] for model in models))
        for name, mine in keys.items()
    }
    for name, mine in items.items():
        if len(mine) < len(keys[name]):
            say(f"{name}: {len(keys[name]) - len(mine)} items lack a result and are left out")
        if len(mine) < 2:
            raise TooLittleData(f"{place}: {name} has results of every model on {len(mine)} items")
    table = {
        name: np.array([[held[model][name][key] for key in mine] for model in models])
        for name, mine in items.items()
    }
    means = np.stack([matrix.mean(1) for matrix in table.values()], axis=1)
    return Scores(tuple(models), tuple(items), means, table, items)


def _item(results: Results, name: str, key: str) -> str:
    """The item that a key belongs to: a question whose choices have own prompts is one item."""
    known = any(_of(rows, name, key) is not None for rows in results.values())
    return key if known or "/" not in key else key.rpartition("/")[0]


def _of(rows: Mapping[str, Mapping[str, float]], name: str, key: str) -> float | None:
    """The result of one item: of the benchmark itself, or of a task of the group `TASK/NUMBER`."""
    if name in rows and key in rows[name]:
        return rows[name][key]
    task, _, number = key.rpartition("/")
    return rows.get(task, {}).get(number)


def _first(keys: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(repr(items[0]) for items in list(keys.values())[:3] if items)


def _number(where: Any, value: Any) -> float:
    if isinstance(value, (bool, int, float)) and abs(float(value)) < 1e100:
        return float(value)
    raise BadFile(f"{where}: a result is {value!r:.60}, expected right or wrong, or a number")
