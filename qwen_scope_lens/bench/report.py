"""The findings on a suite: one self-contained HTML page, and all figures as JSON and CSV.

`analysis.py` computes the findings; this module only shows and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.bench.analysis import Analysis, Performance
from qwen_scope_lens.bench.overlap import Overlap
from qwen_scope_lens.files import write_json
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.stats import Interval
from qwen_scope_lens.tables import Table, plain

__all__ = ["save_report"]

FORMAT, VERSION = "qwen-scope-lens/benchmark-report", 1
SHOWN_PAIRS = 30
IN_FULL = (
    "redundancy",
    "r_hat_at",
    "curves",
    "ceilings",
    "overlaps",
    "layers",
    "agreement",
    "rank_check",
    "performance",
    "warnings",
)
"""Parts of an `Analysis` that the JSON file holds in full."""


def save_report(found: Analysis, path: Path) -> list[Path]:
    """Write the page to `path` and the figures beside it as JSON and CSV. Returns all paths."""
    page = Page("What these benchmarks measure, by their features")
    facts = found.provenance
    page.text(
        f"{len(found.names)} benchmarks, read with {facts['model']} and {facts['sae']} at token"
        f" position {found.position!r}. The footprint of an item is the set of features that are"
        " active there; the footprint of a benchmark is the union over its items. No model was"
        " evaluated for this."
    )
    for line in found.warnings:
        page.text(line)
    _redundancy(page, found)
    _curves(page, found)
    if found.overlaps:
        _overlaps(page, found)
    _truth(page, found)
    if found.performance is not None:
        _performance(page, found, found.performance)
    _layers(page, found)
    _reading(page, found)
    page.save(path)
    return [path, *_write_tables(found, path)]


# The page, part by part.


def _redundancy(page: Page, found: Analysis) -> None:
    page.heading("Redundancy, estimated from footprints")
    table = found.table()
    page.table(table.columns, table.rows)
    page.text(
        "R-hat (equation 9) is large if a few features occur in many items. AUC (equation 8) is the"
        " mean coverage of a random subset over all sizes. Both are computed exactly, without"
        " sampling. R-hat grows with the number of items, so the column beside it gives R-hat for"
        f" {found.at_size:,} items of every benchmark. Brackets: 95% intervals by bootstrap over"
        " the items, centred on the estimate because a resample has fewer distinct items than the"
        " benchmark.",
        quiet=True,
    )


def _curves(page: Page, found: Analysis) -> None:
    page.heading("How much of the footprint a random subset covers")

    def draw(axes: Any) -> None:
        for i, curve in enumerate(found.curves):
            colour, style = f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]
            axes.plot(curve.sizes, curve.coverage, style, color=colour, lw=1.2, label=curve.name)
            axes.fill_between(curve.sizes, curve.low, curve.high, color=colour, alpha=0.12, lw=0)
        axes.set(xscale="log", xlabel="items", ylabel="share of the footprint", ylim=(0, 1.02))
        axes.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    page.figure(
        chart(draw, height=3.6 + 0.25 * math.ceil(len(found.curves) / 4)),
        "Equation 7, in closed form. Shaded: 95% interval by bootstrap over the items",
    )


def _overlaps(page: Page, found: Analysis) -> None:
    page.heading("Overlap of footprints")
    names = found.names
    tables = [_matrix(names, found.overlaps, kind) for kind in ("overlap", "overlap_min")]
    captions = (
        "Overlap (equation 10): the share of the row's footprint that the column covers. It is"
        " asymmetric, and 1 on the diagonal.",
        "The number of shared features divided by the smaller footprint (equation 11). It is"
        " symmetric.",
    )
    for table, caption in zip(tables, captions, strict=True):
        size = max(3.4, 0.34 * len(names) + 2.2)
        page.figure(chart(partial(_heat, names, table), size + 0.8, size), caption)
    page.text(
        "Overlap grows with the number of items of both benchmarks. Compare it with two figures:"
        " the ceiling, which is what a random half of a benchmark covers of its other half, and the"
        f" overlap between {found.at_size:,} random items of each, which does not depend on the"
        " sizes of the benchmarks."
    )
    page.table(
        ("benchmark", "items per half", "covered by the other half"),
        [(row.name, row.half, str(row.overlap)) for row in found.ceilings],
    )
    ranked = sorted(found.overlaps, key=lambda row: -row.equal)
    page.table(
        ("of", "by", "features shared", "overlap", "min-normalised", "at equal size", "by chance"),
        [
            (r.first, r.second, r.shared, str(r.overlap), str(r.overlap_min), r.equal, r.chance)
            for r in ranked[:SHOWN_PAIRS]
        ],
    )
    if len(ranked) > SHOWN_PAIRS:
        page.text(
            f"These are the {SHOWN_PAIRS} of {len(ranked)} ordered pairs with the largest overlap"
            " at equal size; the CSV file has all pairs.",
            quiet=True,
        )


def _truth(page: Page, found: Analysis) -> None:
    if not found.agreement:
        return
    page.heading("Redundancy measured with the panel of models")
    page.table(
        ("benchmark", "items", "models", "accuracy from", "to", "R"),
        [(a.name, a.n_items, a.n_models, *a.accuracy, str(a.r)) for a in found.agreement],
    )
    page.text(
        "R (equation 6) is Kendall's tau between the ranking of the models on a random subset and"
        " on the whole benchmark, averaged over all subset sizes.",
        quiet=True,
    )
    check = found.rank_check
    if check is None:
        return
    page.text(
        f"R against R-hat over {len(found.agreement)} benchmarks: Spearman {check.spearman},"
        f" Pearson {check.pearson}. Spearman with the number of items held fixed:"
        f" {_shown(check.given_size)}. Spearman of R with the number of items alone:"
        f" {check.by_size:.3f}."
    )
    xs = [row.r_hat.value for row in found.redundancy]
    ys = [row.r.value for row in found.agreement]
    page.figure(
        chart(lambda axes: _scatter(axes, xs, ys, found.names, "R-hat", "R", log=True)),
        "R-hat, which is computed from footprints, against R, which it estimates",
    )


def _performance(page: Page, found: Analysis, p: Performance) -> None:
    page.heading("Overlap against similarity of scores")
    rows = [("raw", p.raw)]
    if p.partial is not None:
        rows.append((f"with {p.control} held fixed (equation 12)", p.partial))
    page.table(
        ("performance similarity", "benchmarks", "pairs", "Pearson", "Spearman", "p (shuffled)"),
        [
            (name, c.n_benchmarks, c.n_pairs, str(c.pearson), str(c.spearman), c.p_value)
            for name, c in rows
        ],
    )
    everyone = _matrix(found.names, found.overlaps, "overlap_min")
    at = [found.names.index(name) for name in p.names]
    pairs = np.triu_indices(len(at), 1)
    xs, ys = everyone[np.ix_(at, at)][pairs], p.similarity[pairs]
    axis_names = "overlap, min-normalised", "correlation of scores"
    page.figure(
        chart(lambda axes: _scatter(axes, xs.tolist(), ys.tolist(), (), *axis_names)),
        "One point per pair. Intervals resample benchmarks, because pairs share benchmarks. p is"
        " the probability of a Spearman this large when the benchmarks of one measure are shuffled",
    )


def _layers(page: Page, found: Analysis) -> None:
    page.heading("Other layers")
    if len(found.layers) < 2:
        page.text(
            f"Only layer {found.layer} was extracted. The paper does not say which layer it used,"
            " and conclusions can depend on the layer. Extract all layers with"
            " `qsl bench extract --layers all` to see how much."
        )
        return
    page.text(
        "The paper does not say which layer it used. The table gives the rank correlations between"
        f" each layer and layer {found.layer}:"
    )
    page.table(
        ("layer", "ranking by R-hat", "overlaps of pairs", "most redundant", "least redundant"),
        [
            (
                str(v.layer),
                _number(v.same_ranking),
                _number(v.same_overlaps),
                found.names[int(np.argmax(v.r_hat))],
                found.names[int(np.argmin(v.r_hat))],
            )
            for v in found.layers
        ],
    )
    worst = min((v.same_ranking for v in found.layers if not math.isnan(v.same_ranking)), default=1)
    page.text(
        f"At the layer that differs most, the ranking by R-hat has a correlation of {worst:.2f}"
        " with the ranking shown above."
    )


def _reading(page: Page, found: Analysis) -> None:
    page.heading("How these figures were made")
    facts = found.provenance
    rows = [(key, str(value)) for key, value in facts.items() if key != "benchmarks"]
    page.table(("setting", "value"), rows)
    sources = facts["benchmarks"]
    page.table(
        ("benchmark", "prompts"),
        [
            (name, ", ".join(f"{k}: {v}" for k, v in how.items() if k != "name" and v is not None))
            for name, how in sources.items()
        ],
    )


def _heat(names: Sequence[str], table: np.ndarray, axes: Any) -> None:
    n = len(names)
    mesh = axes.pcolormesh(table[::-1], vmin=0, vmax=1, cmap="viridis", edgecolors="none")
    axes.set_xticks(np.arange(n) + 0.5, names, rotation=90, fontsize=8)
    axes.set_yticks(np.arange(n) + 0.5, list(names)[::-1], fontsize=8)
    if n <= 20:
        for i in range(n):
            for j in range(n):
                colour = "w" if table[i, j] < 0.6 else "k"
                text = f"{table[i, j]:.2f}".lstrip("0")
                place = {"fontsize": 8 if n <= 8 else 5.5, "ha": "center", "va": "center"}
                axes.text(j + 0.5, n - i - 0.5, text, color=colour, **place)
    bar = axes.figure.colorbar(mesh, ax=axes, shrink=0.7)
    bar.solids.set_edgecolor("face")  # else light lines show between its steps


def _scatter(
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    names: Iterable[str],
    x: str,
    y: str,
    log: bool = False,
) -> None:
    axes.scatter(xs, ys, s=14, color="C0")
    for name, a, b in zip(names, xs, ys, strict=False):
        axes.annotate(name, (a, b), fontsize=8, xytext=(3, 2), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(interval: Interval) -> str:
    return "undefined" if math.isnan(interval.value) else str(interval)


# The same figures as JSON and CSV.


def _write_tables(found: Analysis, path: Path) -> list[Path]:
    """`NAME.json` with everything, and one CSV file per table."""
    stem = path.with_suffix("")
    content = {
        "provenance": found.provenance,
        "layer": found.layer,
        "position": found.position,
        "at_size": found.at_size,
        **{name: plain(getattr(found, name)) for name in IN_FULL},
    }
    files = [Path(f"{stem}.json")]
    write_json(files[0], FORMAT, VERSION, content)
    tables = {
        "redundancy": [
            {**_flat(row), "r_hat_at_equal_size": at}
            for row, at in zip(found.redundancy, found.r_hat_at, strict=True)
        ],
        "overlap": [_flat(row) for row in found.overlaps],
        "ceiling": [_flat(row) for row in found.ceilings],
        "coverage": [
            {"benchmark": c.name, "items": int(n), "coverage": y, "low": low, "high": high}
            for c in found.curves
            for n, y, low, high in zip(c.sizes, c.coverage, c.low, c.high, strict=True)
        ],
        "agreement": [_flat(row, skip=("sizes", "tau")) for row in found.agreement],
    }
    for name, rows in tables.items():
        if rows:
            files.append(Path(f"{stem}.{name}.csv"))
            Table.of_records(rows).save_csv(files[-1])
    return files


def _matrix(names: Sequence[str], rows: Sequence[Overlap], kind: str) -> np.ndarray:
    """Overlaps of ordered pairs as a matrix with ones on the diagonal."""
    at = {name: i for i, name in enumerate(names)}
    table = np.eye(len(names))
    for row in rows:
        table[at[row.first], at[row.second]] = getattr(row, kind).value
    return table


def _flat(row: Any, skip: Sequence[str] = ()) -> dict[str, Any]:
    """A dataclass as one row of a table; an interval becomes three columns."""
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
