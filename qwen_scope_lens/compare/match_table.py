"""A matching as a Parquet table, one row a feature of A, and as text. Made by `match.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.files import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

    from qwen_scope_lens.compare.match import Matching

__all__ = ["save_matching", "summary", "to_table"]


def to_table(found: Matching) -> pa.Table:
    """`ref_a`, its nearest with score, q-value and whether mutual, its partner in the one-to-one
    assignment, and the features of B that it is split into. Null is no partner."""
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


def summary(found: Matching, show: int = 10) -> str:
    n = len(found.nearest)
    matched = found.matched
    both = matched & found.mutual
    one_to_one = found.assigned >= 0
    quantiles = ", ".join(f"{x:.3f}" for x in np.quantile(found.score, [0.1, 0.5, 0.9]))
    null = ", ".join(f"{x:.3f}" for x in np.quantile(found.null, [0.1, 0.5, 0.9]))
    sizes = np.bincount(np.minimum(found.n_children, 4), minlength=5)
    lines = [
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
    ]
    order = np.argsort(-np.where(both, found.score, -1), kind="stable")[: min(show, both.sum())]
    width = max((len(f"{found.a}/{f}") for f in order.tolist()), default=0)
    lines += [
        f"  {f'{found.a}/{f}':{width}}  {found.b}/{found.nearest[f]}  {found.score[f]:.3f}"
        for f in order.tolist()
    ]
    return "\n".join(lines)


def _share(part: Any, whole: int) -> str:
    return f"{int(part):,} of {whole:,} ({int(part) / max(1, whole):.0%})"
