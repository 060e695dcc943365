"""Match the features of SAE A with those of SAE B, by decoder cosine or by activation correlation.

Scores come from `nearest.py`. Each best score is compared with best scores against a shuffled copy
of B (`null.py`), so that a feature can be unmatched. Mutual nearest neighbours, the optimal
one-to-one assignment and one-to-many splits all follow from the same scores. Correlations need the
tokens of two stores aligned (`align.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope_lens.compare.null import shuffled_directions, shuffled_rows
from qwen_scope_lens.errors import TooLittleData, WrongShape
from qwen_scope_lens.features.nearest import Nearest, nearest_by_correlation, nearest_by_cosine
from qwen_scope_lens.features.pool import canonical
from qwen_scope_lens.files import whole_file
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_matrix

__all__ = [
    "Matching",
    "assign",
    "match_activations",
    "match_decoders",
    "save_matching",
    "to_table",
]

Array = np.ndarray[Any, Any]

CANDIDATES = 8
NULL_ROWS, NULL_SCORES, MOST_SHUFFLES = 4096, 8192, 40
"""How many features of A are compared with a shuffled B, how many null scores are wanted, and how
many shuffles are made at most. With few null scores no p-value could be small enough for a few
matches among many features."""
COSINE, CORRELATION = "decoder cosine", "activation correlation"


@dataclass(frozen=True, eq=False, repr=False)
class Matching(View):
    """For every feature of A its partner in B; -1 means no partner."""

    a: str  # addresses of the two SAEs, or names of tensors
    b: str
    measure: str
    nearest: Array  # int64 [n_a], the best of B at any score; -1 if no score is defined
    score: Array  # float32 [n_a], its score
    q_value: Array  # float64 [n_a], against the null, with the false-discovery rate over A
    mutual: Array  # bool [n_a], whether both features are the best of each other
    assigned: Array  # int64 [n_a], the partner in the optimal one-to-one assignment
    assigned_score: Array  # float32 [n_a]
    parent: Array  # int64 [n_b], the best of A for each feature of B; -1 below `level`
    parent_score: Array  # float32 [n_b]
    null: Array  # float32, best scores against the shuffled B, ascending
    level: float  # the score that a pair has to exceed to be assigned or a child
    fdr: float
    crowded: int  # features with more candidates than were kept; if 0, `assigned` is optimal
    candidates: Nearest = field(repr=False)
    settings: dict[str, Any]

    @property
    def matched(self) -> Array:
        """Which features of A have a partner beyond chance. `-> bool [n_a]`"""
        return self.q_value <= self.fdr

    @property
    def n_children(self) -> Array:
        """For each feature of A, how many features of B have it as their best. `-> int64 [n_a]`"""
        return np.bincount(self.parent[self.parent >= 0], minlength=len(self.nearest))

    def children(self, feature: int) -> list[tuple[int, float]]:
        """The features of B that this feature of A is split into, best first."""
        mine = np.flatnonzero(self.parent == feature)
        order = np.lexsort((mine, -self.parent_score[mine]))
        return [(int(mine[i]), float(self.parent_score[mine[i]])) for i in order]

    @property
    def pairs(self) -> Array:
        """The features of A in mutual pairs beyond chance, best first. `-> int64 [n_pairs]`"""
        both = self.matched & self.mutual
        return np.argsort(-np.where(both, self.score, -1), kind="stable")[: both.sum()]

    def table(self, most: int | None = None) -> Table:
        """The matching in figures, and its mutual pairs beyond chance, best first."""
        pairs = self.pairs[:most].tolist()
        return Table.of(
            ("A", "B", "score"),
            [(f"{self.a}/{f}", f"{self.b}/{self.nearest[f]}", float(self.score[f])) for f in pairs],
            above=_figures(self),
            more=len(self.pairs) - len(pairs),
        )


def match_decoders(
    a: torch.Tensor,
    b: torch.Tensor,
    names: tuple[str, str] = ("A", "B"),
    *,
    candidates: int = CANDIDATES,
    fdr: float = 0.05,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Matching:
    """Match by the cosine of decoder directions `[n_a, d_model]` and `[n_b, d_model]`.

    Both SAEs must read the same residual space: one model, or a model and its fine-tune.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise WrongShape(
            f"directions {tuple(a.shape)} and {tuple(b.shape)}: expected two matrices over one"
            " residual space. Compare different models by activation correlation on their stores"
        )
    found = nearest_by_cosine(a, b, candidates, progress=progress)
    rng = np.random.default_rng(seed)
    rows = a[torch.from_numpy(np.sort(rng.permutation(len(a))[:NULL_ROWS]))]
    null = [
        nearest_by_cosine(rows, shuffled_directions(b, seed + n), 1, progress=progress).score_a
        for n in range(1, 1 + _shuffles(len(rows)))
    ]
    settings = {"null_rows": len(rows), "shuffles": len(null), "seed": seed}
    return _matching(found, np.concatenate(null)[:, 0], names, COSINE, fdr, settings)


def match_activations(
    a: csr_matrix,
    b: csr_matrix,
    names: tuple[str, str] = ("A", "B"),
    *,
    doc: Array | None = None,
    candidates: int = CANDIDATES,
    fdr: float = 0.05,
    least: int = 5,
    seed: int = 0,
) -> Matching:
    """Find for every feature of A its partner in B, by the correlation of their activations.

    `a [n, n_a]` and `b [n, n_b]` have the same pieces of text as rows. A pair that fires together
    on fewer than `least` pieces has no score; `candidates` partners are kept per feature. Raises
    `WrongShape` if the rows differ in number, and `TooLittleData` below 20 of them. `doc [n]` is
    the document of each piece. With it B is shuffled within documents only, so that a common
    subject or language does not count as agreement.
    """
    if a.shape[0] != b.shape[0]:
        raise WrongShape(f"{a.shape[0]} and {b.shape[0]} rows: expected the same pieces of text")
    if a.shape[0] < 20:
        raise TooLittleData(f"{a.shape[0]} common pieces of text: correlations need some thousands")
    a, b = canonical(a), canonical(b)
    found = nearest_by_correlation(a, b, candidates, least=least)
    fires = np.diff(a.tocsc().indptr) >= least
    null = np.concatenate(
        [
            nearest_by_correlation(a, shuffled_rows(b, seed + n, doc), 1, least=least).score_a[
                fires
            ]
            for n in range(1, 1 + _shuffles(int(fires.sum())))
        ]
    )[:, 0]
    null = np.where(np.isfinite(null), null, 0.0)
    if not len(null):
        raise TooLittleData(f"no feature of {names[0]} fires on {least} common pieces of text")
    settings = {
        "least": least,
        "seed": seed,
        "shuffles": _shuffles(int(fires.sum())),
        "pieces": a.shape[0],
        "shuffled": "all" if doc is None else "within documents",
    }
    return _matching(found, null, names, CORRELATION, fdr, settings, tested=fires)


def _shuffles(scores: int) -> int:
    return min(MOST_SHUFFLES, -(-NULL_SCORES // max(1, scores)))


def _matching(
    found: Nearest,
    null: Array,
    names: tuple[str, str],
    measure: str,
    fdr: float,
    settings: dict[str, Any],
    tested: Array | None = None,
) -> Matching:
    from scipy.stats import false_discovery_control

    null = np.sort(null)
    best, score = found.of_a[:, 0], np.where(found.of_a[:, 0] >= 0, found.score_a[:, 0], 0.0)
    # The share of null scores that reach the score, where the score itself counts as one.
    above = len(null) - np.searchsorted(null, score, side="left")
    p = (1 + above) / (1 + len(null))
    q = np.ones(len(p))
    mine = np.ones(len(p), dtype=bool) if tested is None else tested
    q[mine] = false_discovery_control(p[mine])
    # The p-value at which the step-up procedure stopped, as a score. Any other pair has to exceed
    # it to be as credible as the matches.
    stopped = fdr * max(1, int((q <= fdr).sum())) / max(1, int(mine.sum()))
    level = float(np.quantile(null, 1 - stopped))
    partner, partner_score = assign(found, level)
    back = found.of_b[:, 0]
    real = (back >= 0) & (found.score_b[:, 0] > level)
    mutual = (best >= 0) & (back[np.maximum(best, 0)] == np.arange(len(best)))
    return Matching(
        a=names[0],
        b=names[1],
        measure=measure,
        nearest=best,
        score=score.astype(np.float32),
        q_value=q,
        mutual=mutual,
        assigned=partner,
        assigned_score=partner_score,
        parent=np.where(real, back, -1),
        parent_score=np.where(real, found.score_b[:, 0], 0.0).astype(np.float32),
        null=null.astype(np.float32),
        level=level,
        fdr=fdr,
        crowded=_crowded(found, level),
        candidates=found,
        settings={"candidates": found.of_a.shape[1], "level_quantile": 1 - stopped, **settings},
    )


def assign(nearest: Nearest, level: float) -> tuple[Array, Array]:
    """The one-to-one assignment of A's features to B's with the largest total score.

    `-> partner [n_a], score [n_a]`; the partner is -1 if a feature has none. A pair counts with the
    excess of its score over `level`, so that a feature without a true partner stays unassigned
    instead of taking the partner of another one. Candidates are the best matches of every feature
    of either side, and SciPy's sparse matching assigns them. The result is the optimum over all
    pairs if no feature has more candidates above `level` than were kept.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_a, n_b = len(nearest.of_a), len(nearest.of_b)
    a, b, score = _candidates(nearest, level)
    partner = np.full(n_a, -1, dtype=np.int64)
    found = np.zeros(n_a, dtype=np.float32)
    if not len(a):
        return partner, found
    # Only rows with a candidate. Each has an extra column of its own, which means no partner.
    rows, at = np.unique(a, return_inverse=True)
    alone = np.arange(len(rows))
    cost = coo_matrix(
        (
            np.concatenate([2.0 - (score - level), np.full(len(rows), 2.0)]),
            (np.concatenate([at, alone]), np.concatenate([b, n_b + alone])),
        ),
        shape=(len(rows), n_b + len(rows)),
    ).tocsr()
    row, column = min_weight_full_bipartite_matching(cost)
    real = column < n_b
    partner[rows[row[real]]] = column[real]
    lookup = dict(zip(zip(a.tolist(), b.tolist(), strict=True), score.tolist(), strict=True))
    for i in np.flatnonzero(partner >= 0).tolist():
        found[i] = lookup[i, int(partner[i])]
    return partner, found


def _candidates(nearest: Nearest, level: float) -> tuple[Array, Array, Array]:
    """Pairs of either side's candidates above the level, each once. `-> a, b, score`"""
    n_b = len(nearest.of_b)
    rows = np.repeat(np.arange(len(nearest.of_a)), nearest.of_a.shape[1])
    columns = np.repeat(np.arange(n_b), nearest.of_b.shape[1])
    a = np.concatenate([rows, nearest.of_b.ravel()])
    b = np.concatenate([nearest.of_a.ravel(), columns])
    score = np.concatenate([nearest.score_a.ravel(), nearest.score_b.ravel()])
    good = (a >= 0) & (b >= 0) & (score > level)
    a, b, score = a[good], b[good], score[good].astype(np.float64)
    _, once = np.unique(a * n_b + b, return_index=True)
    return a[once], b[once], score[once]


def _crowded(nearest: Nearest, level: float) -> int:
    """How many features of either side have more candidates above the level than were kept."""
    return int((nearest.score_a[:, -1] > level).sum() + (nearest.score_b[:, -1] > level).sum())


def to_table(found: Matching) -> pa.Table:
    """One row per feature of A: its nearest feature of B with score, q-value and whether it is
    mutual, its partner in the one-to-one assignment, and its children in B. Null means none."""
    import pyarrow as pa

    def names(features: Any) -> list[str | None]:
        return [f"{found.b}/{f}" if f >= 0 else None for f in features.tolist()]

    order = np.lexsort((-found.parent_score, found.parent))
    order = order[found.parent[order] >= 0]
    counts = found.n_children
    starts = np.concatenate([[0], np.cumsum(counts)])
    children = pa.ListArray.from_arrays(
        pa.array(starts, pa.int32()), pa.array([f"{found.b}/{f}" for f in order.tolist()])
    )
    scores = pa.ListArray.from_arrays(
        pa.array(starts, pa.int32()), pa.array(found.parent_score[order])
    )
    table = pa.table(
        {
            "ref_a": [f"{found.a}/{f}" for f in range(len(found.nearest))],
            "nearest": names(found.nearest),
            "score": found.score,
            "q_value": found.q_value,
            "matched": found.matched,
            "mutual": found.mutual,
            "assigned": names(found.assigned),
            "assigned_score": pa.array(found.assigned_score, mask=found.assigned < 0),
            "children": children,
            "children_score": scores,
        }
    )
    facts = {
        "a": found.a,
        "b": found.b,
        "measure": found.measure,
        "level": found.level,
        "fdr": found.fdr,
        "crowded": found.crowded,
        "null_quantiles": np.quantile(found.null, [0, 0.5, 0.9, 0.99, 1]).tolist(),
        **found.settings,
    }
    return table.replace_schema_metadata({"qwen_scope_matching": json.dumps(facts)})


def save_matching(found: Matching, path: str | Path) -> None:
    import pyarrow.parquet as pq

    with whole_file(Path(path)) as partial:
        pq.write_table(to_table(found), partial, compression="zstd")


def facts(found: Matching) -> dict[str, Any]:
    """The matching as plain values: what its table counts, and every mutual pair, best first."""
    return {
        "a": found.a,
        "b": found.b,
        "measure": found.measure,
        "features": len(found.nearest),
        "matched": int(found.matched.sum()),
        "mutual": len(found.pairs),
        "one_to_one": int((found.assigned >= 0).sum()),
        "level": found.level,
        "fdr": found.fdr,
        "settings": found.settings,
        "rows": [
            {
                "feature": f"{found.a}/{f}",
                "partner": f"{found.b}/{found.nearest[f]}",
                "score": float(found.score[f]),
                "q_value": float(found.q_value[f]),
            }
            for f in found.pairs.tolist()
        ],
    }


def _figures(found: Matching) -> tuple[str, ...]:
    n = len(found.nearest)
    matched = found.matched
    both = matched & found.mutual
    one_to_one = found.assigned >= 0
    quantiles = ", ".join(f"{x:.3f}" for x in np.quantile(found.score, [0.1, 0.5, 0.9]))
    null = ", ".join(f"{x:.3f}" for x in np.quantile(found.null, [0.1, 0.5, 0.9]))
    sizes = np.bincount(np.minimum(found.n_children, 4), minlength=5)
    return (
        f"{found.a} -> {found.b}, by {found.measure}",
        f"matched beyond chance (q <= {found.fdr:g}): {_share(matched.sum(), n)};"
        f" mutual: {_share(both.sum(), n)}; unmatched: {_share(n - matched.sum(), n)}",
        f"best score, 10/50/90 %: {quantiles}; shuffled B: {null}; a pair counts above"
        f" {found.level:.3f}",
        f"one to one above that level: {_share(one_to_one.sum(), n)}, mean score"
        f" {found.assigned_score[one_to_one].mean() if one_to_one.any() else 0:.3f}"
        + (f"; {found.crowded} features had more candidates than kept" if found.crowded else ""),
        f"features of B whose best is a feature of A, per feature of A: none {sizes[0]:,},"
        f" one {sizes[1]:,}, two {sizes[2]:,}, three {sizes[3]:,}, more {sizes[4]:,}",
    )


def _share(part: Any, whole: int) -> str:
    return f"{int(part):,} of {whole:,} ({int(part) / max(1, whole):.0%})"
