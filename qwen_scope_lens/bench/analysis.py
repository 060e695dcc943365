"""All findings on a suite at one layer and position, computed once for the report and its tables.

The other modules of this room compute the single figures; `report.py` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.bench.correlation import DRAWS as RESAMPLES
from qwen_scope_lens.bench.correlation import (
    PairCorrelation,
    correlate,
    correlate_pairs,
    partial_rank,
    similarity,
    split_control,
)
from qwen_scope_lens.bench.coverage import (
    Curve,
    Redundancy,
    coverage_curve,
    redundancy,
    redundancy_at,
)
from qwen_scope_lens.bench.footprint import DRAWS, Footprint, saturated
from qwen_scope_lens.bench.overlap import (
    Ceiling,
    Overlap,
    ceiling,
    overlap_matrix,
    overlaps,
)
from qwen_scope_lens.bench.panel import Agreement, Scores, agreement
from qwen_scope_lens.bench.suite import Suite
from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.stats import Interval, spearman
from qwen_scope_lens.tables import Table, View

__all__ = [
    "Analysis",
    "LayerView",
    "Performance",
    "RankCheck",
    "analyse",
    "performance",
    "rank_check",
]

COLUMNS = (
    "benchmark",
    "items",
    "features",
    "features per item",
    "AUC",
    "R-hat",
    "R-hat at equal size",
    "items for half of the footprint",
    "new features per further item",
)


@dataclass(frozen=True)
class LayerView:
    """The conclusions at one of the extracted layers, compared with the report's layer."""

    layer: int
    r_hat: tuple[float, ...]  # per benchmark
    same_ranking: float  # Spearman of R-hat with R-hat at the report's layer
    same_overlaps: float  # Spearman of overlap_min over pairs with that at the report's layer


@dataclass(frozen=True)
class RankCheck:
    """R against R-hat over the benchmarks."""

    pearson: Interval
    spearman: Interval
    given_size: Interval  # Spearman with the number of items held fixed
    by_size: float  # Spearman of R with the number of items, which needs no features


@dataclass(frozen=True, eq=False)
class Performance:
    """overlap_min against performance similarity over the pairs."""

    names: tuple[str, ...]
    similarity: np.ndarray  # [benchmarks, benchmarks]
    raw: PairCorrelation
    control: str | None
    partial: PairCorrelation | None  # with the control held fixed, equation 12


@dataclass(frozen=True, eq=False, repr=False)
class Analysis(View):
    """The findings on one suite at one layer."""

    layer: int
    position: str
    provenance: dict[str, Any]
    redundancy: list[Redundancy]
    at_size: int  # items of the smallest benchmark
    r_hat_at: list[float]  # R-hat of `at_size` items of each benchmark
    curves: list[Curve]
    ceilings: list[Ceiling]
    overlaps: list[Overlap]
    layers: list[LayerView]
    agreement: list[Agreement]  # empty without single results
    rank_check: RankCheck | None
    performance: Performance | None  # needs scores of three benchmarks
    warnings: tuple[str, ...] = ()  # one per benchmark whose footprint uses most of the dictionary

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.redundancy)

    def table(self, most: int | None = None) -> Table:
        """The redundancy of each benchmark, the most redundant first."""
        rows = [
            (
                row.name,
                row.n_items,
                row.n_features,
                row.features_per_item,
                str(row.auc),
                str(row.r_hat),
                at_size,
                row.half,
                row.new_per_item,
            )
            for row, at_size in zip(self.redundancy, self.r_hat_at, strict=True)
        ]
        order = np.argsort([-row.r_hat.value for row in self.redundancy], kind="stable")[:most]
        facts = self.provenance
        return Table.of(
            COLUMNS,
            [rows[i] for i in order],
            above=(
                f"{len(rows)} benchmarks, read with {facts['model']} and {facts['sae']} at token"
                f" position {self.position!r}",
                *self.warnings,
            ),
            more=len(rows) - len(order),
        )

    def overlap_table(self, kind: str = "overlap") -> Table:
        """The share of the row's footprint that the column covers; `overlap_min` for the share of
        the smaller footprint."""
        found = {(row.first, row.second): getattr(row, kind).value for row in self.overlaps}
        rows = [
            [first, *(found.get((first, second), 1.0) for second in self.names)]
            for first in self.names
        ]
        return Table.of(["benchmark", *self.names], rows, heat=self.names)

    def _repr_html_(self) -> str:
        overlaps = self.overlap_table()._repr_html_() if self.overlaps else ""
        return super()._repr_html_() + overlaps


def analyse(
    suite: Suite,
    layer: int | None = None,
    position: str = "last",
    scores: Scores | None = None,
    control: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Compute footprints of all benchmarks and all findings on them.

    `control` is the broad benchmark that performance similarity holds fixed. It is part of the
    redundancy ranking but of none of the pairs.
    """
    chosen = suite.layers[-1] if layer is None else layer
    say(f"footprints at layer {chosen}, position {position}")
    footprints = suite.footprints(chosen, position)
    warnings = saturated(footprints)
    for line in warnings:
        say(line)
    if control is not None and scores is None:
        raise TooLittleData(f"control benchmark {control!r} without scores: pass --scores")
    say("redundancy and coverage curves")
    rows = [redundancy(f, draws, seed) for f in footprints]
    at_size = min(len(f) for f in footprints)
    curves = [coverage_curve(f, draws=draws, seed=seed) for f in footprints]
    say("overlaps")
    pairs = overlaps(footprints, draws, seed) if len(footprints) > 1 else []
    ceilings = [ceiling(f, seed=seed) for f in footprints]
    truths: list[Agreement] = []
    left_out: dict[str, int] = {}
    compared = None
    if scores is not None:
        say("scores of the panel")
        scores.only([f.name for f in footprints])
        had = {name: result.shape[1] for name, result in scores.results.items()}
        scores = scores.matched({f.name: f.keys for f in footprints})
        mine = scores.only([f.name for f in footprints])
        for name, result in mine.results.items():
            if result.shape[1] < had[name]:
                left_out[name] = had[name] - result.shape[1]
                say(
                    f"{name}: {left_out[name]:,} of {had[name]:,} scored items were not extracted,"
                    " and are left out of its scores"
                )
        truths = [
            agreement(f.name, mine.results[f.name], seed=seed)
            for f in footprints
            if f.name in mine.results
        ]
        others = [f for f in footprints if f.name != control]
        compared = performance(others, scores, control) if len(others) >= 3 else None
    return Analysis(
        layer=chosen,
        position=position,
        provenance={
            **_provenance(suite, chosen, position, draws, seed),
            **({"scored items left out": left_out} if left_out else {}),
        },
        redundancy=rows,
        at_size=at_size,
        r_hat_at=[redundancy_at(f, at_size) for f in footprints],
        curves=curves,
        ceilings=ceilings,
        overlaps=pairs,
        layers=_layers(suite, footprints, chosen, position),
        agreement=truths,
        rank_check=rank_check(rows, truths) if len(truths) >= 3 else None,
        performance=compared,
        warnings=tuple(warnings),
    )


def rank_check(
    rows: Sequence[Redundancy], truths: Sequence[Agreement], resamples: int = RESAMPLES
) -> RankCheck:
    """Correlate the redundancy estimated from features (R-hat) with the one of models' scores (R).

    The correlation is also given with the number of items held fixed. `rows` and `truths` list the
    same benchmarks in the same order; otherwise `StoreMismatch` is raised.
    """
    ours, theirs = [row.name for row in rows], [truth.name for truth in truths]
    if ours != theirs:
        raise StoreMismatch(
            f"footprints are of {', '.join(ours)}, the scores of {', '.join(theirs)}: expected the"
            " same benchmarks in the same order"
        )
    r_hat = np.array([row.r_hat.value for row in rows])
    r = np.array([truth.r.value for truth in truths])
    size = np.array([float(row.n_items) for row in rows])
    straight, ranks = correlate(r, r_hat, draws=resamples)
    given_size = partial_rank(r, r_hat, size, draws=resamples)
    return RankCheck(straight, ranks, given_size, spearman(r, size))


def performance(
    footprints: Sequence[Footprint],
    scores: Scores,
    control: str | None,
    resamples: int = RESAMPLES,
) -> Performance:
    """Correlate, over all pairs of benchmarks, overlapping footprints with similar scores.

    With `control`, a benchmark that is not among the footprints, its scores are held fixed as well.
    Raises `StoreMismatch` if it is among them.
    """
    names = [f.name for f in footprints]
    if control is not None and control in names:
        raise StoreMismatch(
            f"the control benchmark {control} is one of the pairs: it must not be, because equation"
            " 12 would divide by zero"
        )
    overlap = overlap_matrix(footprints, smallest=True)
    mine = scores.only(names)
    raw = similarity(mine.table, names)
    partly = None
    if control is not None:
        table, rest, column = split_control(scores.table, scores.benchmarks, control)
        order = [rest.index(name) for name in names]
        held_fixed = similarity(table[:, order], names, column)
        partly = correlate_pairs(overlap, held_fixed, shuffles=resamples - 1, draws=resamples)
    plain = correlate_pairs(overlap, raw, shuffles=resamples - 1, draws=resamples)
    return Performance(tuple(names), raw, plain, control, partly)


def _layers(
    suite: Suite, footprints: Sequence[Footprint], chosen: int, position: str
) -> list[LayerView]:
    pairs = np.triu_indices(len(footprints), 1)

    def figures(group: Sequence[Footprint]) -> tuple[np.ndarray, np.ndarray]:
        values = np.array([redundancy(f, draws=1).r_hat.value for f in group])
        return values, overlap_matrix(group, smallest=True)[pairs]

    here = figures(footprints)
    views = []
    for layer in suite.layers:
        there = here if layer == chosen else figures(suite.footprints(layer, position))
        views.append(
            LayerView(
                layer,
                tuple(there[0].tolist()),
                *(spearman(a, b) for a, b in zip(here, there, strict=True)),
            )
        )
    return views


def _provenance(suite: Suite, layer: int, position: str, draws: int, seed: int) -> dict[str, Any]:
    from qwen_scope_lens.version import __version__

    manifest = suite.benchmarks[0].store.manifest
    return {
        "model": manifest.model.id,
        "sae": suite.benchmarks[0].store.sae(layer).ref,
        "layer": layer,
        "position": position,
        "draws": draws,
        "seed": seed,
        "package": __version__,
        "benchmarks": {b.name: dict(b.facts) for b in suite.benchmarks},
    }
