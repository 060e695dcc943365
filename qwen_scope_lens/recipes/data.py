"""The sources of a recipe: rows of a local file, or of a data set on the hub at its revision.

A source says where its rows come from (`rows` in the recipe itself, `hub` with `configs`, `split`
and `revision`, or `file` in the folder that `--data` names), which of them count (`where`: column
-> value or list of values) and how columns are called here (`columns`: our name -> theirs). A
column inside another one is written with a dot, `extra.style`. With `by`, each value of a column is
a part of its own, such as a category of MMLU-Pro.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.stores.corpus import read_rows

__all__ = ["local_file", "rows_of", "text_rows"]

ABSENT = object()


def local_file(work: Work, name: str) -> Path | None:
    """The file of a source in the data folder; None where the hub is read."""
    source = work.source(name)
    if "rows" in source and "file" not in source:
        return None
    if work.run.data is None:
        if "hub" not in source and "task" not in source:
            raise BadCorpus(
                f"source {name} of recipe {work.run.recipe.name} is not on the hub: pass --data"
                f" FOLDER with {source['file']} in it"
            )
        return None
    if "file" not in source:
        raise BadCorpus(
            f"source {name} of recipe {work.run.recipe.name} names no file: set one with"
            f" --set data.{name}.file=NAME, or leave --data out to read the hub"
        )
    path = work.run.data / str(source["file"])
    if not path.exists():
        raise BadCorpus(
            f"{path} does not exist: recipe {work.run.recipe.name} expects source {name} there."
            f" Give another name with --set data.{name}.file=NAME, or leave --data out to read"
            f" {source.get('hub') or source.get('task') or 'nothing else'}"
        )
    return work.uses(path)


def rows_of(work: Work, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source with their place, filtered, and with our names of columns."""
    source, path = work.source(name), local_file(work, name)
    where = {key: _listed(value) for key, value in (source.get("where") or {}).items()}
    columns: Mapping[str, str] = source.get("columns") or {}
    found = 0
    for place, row in _raw(source, path):
        if not isinstance(row, Mapping):
            raise BadCorpus(
                f"{place} of source {name} is a {type(row).__name__}: expected a mapping of columns"
                " to values"
            )
        if any(_cell(row, key) not in values for key, values in where.items()):
            continue
        found += 1
        named = {ours: _cell(row, theirs, ABSENT) for ours, theirs in columns.items()}
        yield place, {**row, **{key: cell for key, cell in named.items() if cell is not ABSENT}}
    if not found:
        raise BadCorpus(f"source {name} has no rows" + (f" with {where}" if where else ""))


def text_rows(work: Work, name: str, *needed: str) -> list[dict[str, Any]]:
    """Rows with a text and the labels that a stage needs; raises for a row without one of them."""
    found = []
    for place, row in rows_of(work, name):
        if missing := [key for key in ("text", *needed) if row.get(key) is None]:
            raise BadCorpus(
                f"{place} of source {name} has no {', '.join(missing)}: it has"
                f" {', '.join(map(str, row))}. Name the column with"
                f" --set 'data.{name}.columns={{{missing[0]}: ITS NAME}}'"
            )
        found.append(row)
    return found


def _raw(source: Mapping[str, Any], path: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path is not None:
        yield from read_rows(path)
        return
    if "rows" in source:
        yield from (
            (f"row {number} of the recipe", row) for number, row in enumerate(source["rows"])
        )
        return
    for config in source.get("configs") or [None]:
        name = source["hub"] if config is None else f"{source['hub']}:{config}"
        for place, row in read_rows(
            name, split=source.get("split"), revision=source.get("revision")
        ):
            yield place, {**row, "config": config}


def _cell(row: Mapping[str, Any], column: str, absent: Any = None) -> Any:
    """A value of a row, or of a mapping inside it; `absent` where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    within = row.get(outer) if dot else None
    return _cell(within, inner, absent) if isinstance(within, Mapping) else absent


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
