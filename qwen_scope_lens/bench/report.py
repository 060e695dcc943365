"""The findings on a suite as one self-contained HTML page.

What is found is `analysis.py`; here it is only shown. The same as JSON and CSV is `tables.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.bench.analysis import Analysis, Performance
from qwen_scope_lens.bench.intervals import Interval
from qwen_scope_lens.bench.tables import matrix, write_tables
from qwen_scope_lens.pages import Page, chart

__all__ = ["REDUNDANCY_COLUMNS", "redundancy_rows", "save_report"]

SHOWN_PAIRS = 30
NAMED_CURVES = 12

REDUNDANCY_COLUMNS = (
    "benchmark", "items", "features", "a item", "AUC", "R-hat", "R-hat at equal size",
    "items for half", "new features a further item",
)  # fmt: skip


def save_report(found: Analysis, path: Path) -> list[Path]:
    """Write `path` (HTML) and, beside it, the same as JSON and CSV. Returns all files."""
    page = Page("What these benchmarks measure, by their features")
    facts = found.provenance
    page.text(
        f"{len(found.names)} benchmarks read by {facts['model']} through {facts['sae']} at token"
        f" position {found.position!r}. An item's footprint is the set of features that are active"
        " there, a benchmark's the union over its items. No model was evaluated for this."
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
    return [path, *write_tables(found, path)]


def redundancy_rows(found: Analysis) -> list[list[Any]]:
    """The ranking, most redundant first; the columns are REDUNDANCY_COLUMNS."""
    rows = []
    for row, at_size in zip(found.redundancy, found.r_hat_at, strict=True):
        rows.append([
            row.name, row.n_items, row.n_features, row.features_per_item, str(row.auc),
            str(row.r_hat), at_size, row.half, row.new_per_item,
        ])  # fmt: skip
    order = np.argsort([-row.r_hat.value for row in found.redundancy], kind="stable")
    return [rows[i] for i in order]


# The page, part by part.


def _redundancy(page: Page, found: Analysis) -> None:
    page.heading("Redundancy, without running a model")
    page.table(REDUNDANCY_COLUMNS, redundancy_rows(found))
    page.text(
        "R-hat (equation 9) is large where few features come back in many items; AUC (equation 8)"
        " is the mean coverage of a random subset over all its sizes. Both are exact, without"
        " sampling. R-hat grows with the number of items, so the column beside it cuts every"
        f" benchmark to {found.at_size:,}. Brackets: 95% by bootstrap over the items, centred on"
        " the estimate because a resample has fewer distinct items than the benchmark.",
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
        axes.legend(fontsize=7, ncols=1 if len(found.curves) <= NAMED_CURVES else 2,
                    loc="center left", bbox_to_anchor=(1.0, 0.5))  # fmt: skip

    page.figure(chart(draw, width=8.5, height=4.2), "Equation 7, in closed form; shaded: bootstrap")


def _overlaps(page: Page, found: Analysis) -> None:
    page.heading("Overlap of footprints")
    names = found.names
    tables = [matrix(names, found.overlaps, kind) for kind in ("overlap", "overlap_min")]
    captions = (
        "Overlap (equation 10): the share of the row's footprint that the column covers."
        " Asymmetric; the diagonal is 1.",
        "The same divided by the smaller footprint (equation 11). Symmetric.",
    )
    for table, caption in zip(tables, captions, strict=True):
        size = max(3.4, 0.34 * len(names) + 2.2)
        page.figure(chart(partial(_heat, names, table), size + 0.8, size), caption)
    page.text(
        "Overlap grows with the number of items on both sides. Two things to hold it against: the"
        " ceiling, what a random half of a benchmark covers of its other half, and the overlap of"
        f" {found.at_size:,} random items of each, which no difference in size can explain."
    )
    page.table(
        ("benchmark", "items in a half", "covered by its other half"),
        [(row.name, row.half, str(row.overlap)) for row in found.ceilings],
    )
    ranked = sorted(found.overlaps, key=lambda row: -row.equal)
    page.table(
        ("of", "by", "features shared", "overlap", "min-normalised", "at equal size",
         "by chance"),
        [(r.first, r.second, r.shared, str(r.overlap), str(r.overlap_min), r.equal, r.chance)
         for r in ranked[:SHOWN_PAIRS]],
    )  # fmt: skip
    if len(ranked) > SHOWN_PAIRS:
        page.text(f"The {SHOWN_PAIRS} of {len(ranked)} ordered pairs with the largest overlap at"
                  " equal size; all are in the CSV.", quiet=True)  # fmt: skip


def _truth(page: Page, found: Analysis) -> None:
    if not found.agreement:
        return
    page.heading("Redundancy of the rankings, from the panel's results")
    page.table(
        ("benchmark", "items", "models", "accuracy from", "to", "R"),
        [(a.name, a.n_items, a.n_models, *a.accuracy, str(a.r)) for a in found.agreement],
    )
    page.text("R (equation 6) is the mean over all subset sizes of Kendall's tau between the models"
              " ranked on a random subset and on the whole.", quiet=True)  # fmt: skip
    check = found.rank_check
    if check is None:
        return
    page.text(
        f"R against R-hat over {len(found.agreement)} benchmarks: Spearman {check.spearman},"
        f" Pearson {check.pearson}. With the number of items held fixed:"
        f" {_shown(check.given_size)}. The number of items alone reaches {check.by_size:.3f}."
    )
    xs = [row.r_hat.value for row in found.redundancy]
    ys = [row.r.value for row in found.agreement]
    page.figure(
        chart(lambda axes: _scatter(axes, xs, ys, found.names, "R-hat", "R", log=True)),
        "The proxy and what it stands for",
    )


def _performance(page: Page, found: Analysis, p: Performance) -> None:
    page.heading("Overlap against similarity of scores")
    rows = [("raw", p.raw)]
    if p.partial is not None:
        rows.append((f"{p.control} taken out (equation 12)", p.partial))
    page.table(
        ("performance similarity", "benchmarks", "pairs", "Pearson", "Spearman", "p (shuffled)"),
        [(name, c.n_benchmarks, c.n_pairs, str(c.pearson), str(c.spearman), c.p_value)
         for name, c in rows],
    )  # fmt: skip
    everyone = matrix(found.names, found.overlaps, "overlap_min")
    at = [found.names.index(name) for name in p.names]
    pairs = np.triu_indices(len(at), 1)
    xs, ys = everyone[np.ix_(at, at)][pairs], p.similarity[pairs]
    page.figure(
        chart(lambda axes: _scatter(
            axes, xs.tolist(), ys.tolist(), (), "overlap, min-normalised", "correlation of scores"
        )),
        "One point a pair. Intervals resample benchmarks, as pairs share them; p: a Spearman as"
        " large when the benchmarks of one measure are shuffled",
    )  # fmt: skip


def _layers(page: Page, found: Analysis) -> None:
    page.heading("Other layers")
    if len(found.layers) < 2:
        page.text(
            f"Only layer {found.layer} was extracted. The paper does not say which layer it used,"
            " and conclusions can move with it: `qsl bench extract --layers all` shows how much."
        )
        return
    page.text(
        "The paper does not say which layer it used. Rank correlations of the conclusions at each"
        f" layer with those at layer {found.layer}:"
    )
    page.table(
        ("layer", "ranking by R-hat", "overlaps of pairs", "most redundant", "least redundant"),
        [(str(v.layer), _number(v.same_ranking), _number(v.same_overlaps),
          found.names[int(np.argmax(v.r_hat))], found.names[int(np.argmin(v.r_hat))])
         for v in found.layers],
    )  # fmt: skip
    worst = min((v.same_ranking for v in found.layers if not math.isnan(v.same_ranking)), default=1)
    page.text(
        f"The ranking by R-hat at the most different layer correlates {worst:.2f} with that shown."
    )


def _reading(page: Page, found: Analysis) -> None:
    page.heading("How these figures were made")
    facts = found.provenance
    rows = [(key, str(value)) for key, value in facts.items() if key != "benchmarks"]
    page.table(("setting", "value"), rows)
    sources = facts["benchmarks"]
    page.table(
        ("benchmark", "prompts"),
        [(name, ", ".join(f"{k}: {v}" for k, v in how.items() if k != "name" and v is not None))
         for name, how in sources.items()],
    )  # fmt: skip


def _heat(names: Sequence[str], table: np.ndarray, axes: Any) -> None:
    n = len(names)
    mesh = axes.pcolormesh(table[::-1], vmin=0, vmax=1, cmap="viridis", edgecolors="none")
    axes.set_xticks(np.arange(n) + 0.5, names, rotation=90, fontsize=7)
    axes.set_yticks(np.arange(n) + 0.5, list(names)[::-1], fontsize=7)
    if n <= 20:
        for i in range(n):
            for j in range(n):
                value = table[i, j]
                axes.text(j + 0.5, n - i - 0.5, f"{value:.2f}".lstrip("0"), fontsize=5.5,
                          ha="center", va="center", color="w" if value < 0.6 else "k")  # fmt: skip
    axes.figure.colorbar(mesh, ax=axes, shrink=0.7)


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
        axes.annotate(name, (a, b), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(interval: Interval) -> str:
    return "undefined" if math.isnan(interval.value) else str(interval)
