"""The findings on a suite as JSON and CSV: everything that the report shows, in full."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.bench.analysis import Analysis
from qwen_scope_lens.bench.intervals import Interval
from qwen_scope_lens.bench.overlap import Overlap
from qwen_scope_lens.files import whole_file, write_json

__all__ = ["flat", "matrix", "plain", "write_csv", "write_tables"]

FORMAT, VERSION = "qwen-scope-lens/benchmark-report", 1


def write_tables(found: Analysis, path: Path) -> list[Path]:
    """`report.json` with everything, and one CSV for each table."""
    stem = path.with_suffix("")
    content = {
        "provenance": found.provenance,
        "layer": found.layer,
        "position": found.position,
        "at_size": found.at_size,
        **{name: plain(getattr(found, name)) for name in (
            "redundancy", "r_hat_at", "curves", "ceilings", "overlaps", "layers", "agreement",
            "rank_check", "performance", "warnings",
        )},
    }  # fmt: skip
    files = [Path(f"{stem}.json")]
    write_json(files[0], FORMAT, VERSION, content)
    for name, rows in (
        ("redundancy", [
            {**flat(row), "r_hat_at_equal_size": at}
            for row, at in zip(found.redundancy, found.r_hat_at, strict=True)
        ]),
        ("overlap", [flat(row) for row in found.overlaps]),
        ("ceiling", [flat(row) for row in found.ceilings]),
        ("coverage", [
            {"benchmark": c.name, "items": int(n), "coverage": y, "low": low, "high": high}
            for c in found.curves
            for n, y, low, high in zip(c.sizes, c.coverage, c.low, c.high, strict=True)
        ]),
        ("agreement", [flat(row, skip=("sizes", "tau")) for row in found.agreement]),
    ):  # fmt: skip
        if rows:
            files.append(Path(f"{stem}.{name}.csv"))
            write_csv(files[-1], rows)
    return files


def matrix(names: Sequence[str], rows: Sequence[Overlap], kind: str) -> np.ndarray:
    at = {name: i for i, name in enumerate(names)}
    table = np.eye(len(names))
    for row in rows:
        table[at[row.first], at[row.second]] = getattr(row, kind).value
    return table


def flat(row: Any, skip: Sequence[str] = ()) -> dict[str, Any]:
    """A dataclass as one row of a table; an interval as three columns."""
    cells: dict[str, Any] = {}
    for entry in fields(row):
        value = getattr(row, entry.name)
        if entry.name in skip:
            continue
        if isinstance(value, Interval):
            cells[entry.name] = value.value
            cells[f"{entry.name}_low"], cells[f"{entry.name}_high"] = value.low, value.high
        elif isinstance(value, tuple):
            cells |= {f"{entry.name}_{i}": part for i, part in enumerate(value)}
        else:
            cells[entry.name] = value
    return cells


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plain(value: Any) -> Any:
    """For JSON: dataclasses, arrays and NaN as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
