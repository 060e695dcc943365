"""Statistics as text for a terminal, and as a Parquet table.

`statistics.py` counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.files import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

    from qwen_scope_lens.features.statistics import Example, FeatureStatistics
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["facts", "feature_facts", "feature_text", "save_table", "snippet", "summary", "to_table"]

AROUND = 40
"""Characters shown on each side of a token."""

SHORT = (0.01, 0.1, 0.5, 0.9, 0.99)


def to_table(found: FeatureStatistics) -> pa.Table:
    """One row per feature: its address, its counts, and its examples and partners as lists."""
    import pyarrow as pa

    layer = LayerRef.parse(found.sae)
    columns: dict[str, Any] = {
        "feature": np.arange(found.d_sae),
        "ref": [str(layer.feature(number)) for number in range(found.d_sae)],
        "density": found.density,
        "document_frequency": found.document_frequency,
        "token_count": found.token_count,
        "doc_count": found.doc_count,
        "mean_active": found.mean_active,
        "maximum": found.maximum,
    }
    examples = ("top_doc", "top_position", "top_value")
    for name in ("histogram", *examples, "partner", "partner_count", "partner_jaccard"):
        rows = getattr(found, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    facts = {
        "sae": found.sae,
        "n_docs": found.n_docs,
        "n_tokens": found.n_tokens,
        "kept_only": found.kept_only,
        "pair_tokens": found.pair_tokens,
        "bin_edges": found.bin_edges.tolist(),
    }
    return pa.table(columns).replace_schema_metadata({"qwen_scope_statistics": json.dumps(facts)})


def save_table(found: FeatureStatistics, path: str | Path) -> None:
    import pyarrow.parquet as pq

    with whole_file(Path(path)) as partial:
        pq.write_table(to_table(found), partial, compression="zstd")


def facts(found: FeatureStatistics, pairs: int = 10) -> dict[str, Any]:
    """The layer as a whole and its features as plain values; only those that fire."""
    columns = ("density", "document_frequency", "mean_active", "maximum")
    return {
        "sae": found.sae,
        "documents": found.n_docs,
        "tokens": found.n_tokens,
        "first_and_extreme_left_out": found.kept_only,
        "features_that_fire": int((~found.dead).sum()),
        "features_per_token": found.l0,
        "fire_together": [
            {"features": [a, b], "tokens": n, "jaccard": score}
            for a, b, n, score in found.top_pairs(pairs)
        ],
        "rows": [
            {"feature": feature, **{name: getattr(found, name)[feature] for name in columns}}
            for feature in np.flatnonzero(~found.dead).tolist()
        ],
    }


def feature_facts(
    found: FeatureStatistics, feature: int, store: FeatureStore, most: int
) -> dict[str, Any]:
    """One feature as plain values: its partners and its strongest documents."""
    texts = store.documents(["text"])["text"]
    partners = zip(found.partner[feature], found.partner_jaccard[feature], strict=True)
    return {
        "feature": str(LayerRef.parse(found.sae).feature(feature)),
        "fires_with": [{"feature": p, "jaccard": score} for p, score in partners if p >= 0],
        "strongest": [
            {
                "document": one.doc,
                "token": one.position,
                "value": one.value,
                "text": snippet(store, one.doc, one.position, texts[one.doc].as_py()),
            }
            for one in found.top_examples(feature)[:most]
        ],
    }


def summary(found: FeatureStatistics, pairs: int = 10) -> str:
    """The layer as a whole, and the features that most often fire together."""
    alive = ~found.dead
    lines = [*found.table(0).above]
    if alive.any():
        shares = np.quantile(found.density[alive], SHORT)
        lines.append(
            "share of tokens that a feature fires on, by quantile: "
            + ", ".join(f"{q:.0%} {share:.2%}" for q, share in zip(SHORT, shares, strict=True))
        )
        often = np.argsort(-found.density, kind="stable")[:5]
        lines.append(
            "most often: " + ", ".join(f"{f} ({found.density[f]:.0%})" for f in often.tolist())
        )
    together = found.top_pairs(pairs)
    if together:
        lines.append(f"fire together (of {found.pair_tokens:,} tokens; Jaccard):")
        lines += [f"  {a:6} {b:6}  {n:8,} tokens  {score:.2f}" for a, b, n, score in together]
    return "\n".join(lines)


def feature_text(found: FeatureStatistics, feature: int, store: FeatureStore, most: int) -> str:
    """One feature: its figures, its strongest documents and some tokens from weak to strong."""
    top = found.top_examples(feature)
    lines = [
        f"{LayerRef.parse(found.sae).feature(feature)}: fires on {found.density[feature]:.3%} of"
        f" tokens, {found.document_frequency[feature]:.1%} of documents; mean"
        f" {found.mean_active[feature]:.3g}, maximum {found.maximum[feature]:.3g}"
    ]
    partners = [
        f"{other} ({score:.2f})"
        for other, score in zip(
            found.partner[feature].tolist(), found.partner_jaccard[feature].tolist(), strict=True
        )
        if other >= 0
    ]
    if partners:
        lines.append(f"fires with: {', '.join(partners)}")
    texts = store.documents(["text"])["text"]

    def line(example: Example) -> str:
        shown = snippet(store, example.doc, example.position, texts[example.doc].as_py())
        place = f"document {example.doc}, token {example.position}"
        return f"  {example.value:8.3g}  {shown}   ({place})"

    lines += ["strongest:", *map(line, top[:most])]
    spread = found.quantile_examples(feature, (0.75, 0.5, 0.25))
    lines += ["at three quarters, half, a quarter of its tokens:"] if spread else []
    return "\n".join([*lines, *map(line, spread)])


def snippet(store: FeatureStore, doc: int, position: int, text: str | None) -> str:
    """The token in its text, between 《 and 》; the token alone where there is no text."""
    start, end = store.spans(doc)[position].tolist()
    if start < 0 or text is None:
        return f"《{store.by_token(doc).tokens[position]}》"
    left, right = text[max(0, start - AROUND) : start], text[end : end + AROUND]
    return " ".join(f"{left}《{text[start:end]}》{right}".split())
