"""Feature drift between two models: the same texts and the same SAE in two stores.

The unit is the document, because tokens of one text are not independent. A change counts if more
documents move in one direction than a fair coin explains (exact two-sided sign test), with the
false-discovery rate controlled over all features of all layers. `side_by_side.py` reads the stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.compare.side_by_side import SideBySide, side_by_side
from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.pages import Link, Page, chart
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Drift", "LayerDrift", "PairDrift", "drift", "drift_page", "summary"]

Array = np.ndarray[Any, Any]

KINDS = ("appeared", "vanished", "more", "less", "stronger", "weaker", "same")
MANY_TIMES = 5.0
MOST_ROWS = 25
MEANING = {
    "appeared": f"fires more than {MANY_TIMES:g} times as often",
    "vanished": f"fires less than a {MANY_TIMES:g}th as often",
    "more": "fires more often",
    "less": "fires less often",
    "stronger": "as often, but stronger",
    "weaker": "as often, but weaker",
}
COLUMNS = {
    "layer": "layer",
    "overlap": "overlap of active sets",
    "cosine": "cosine of codes",
    "L0 before": "L0 before",
    "L0 after": "L0 after",
    "FVU before": "FVU before",
    "FVU after": "FVU after",
}
"""What the table says of a layer -> the words for it on the page."""


@dataclass(frozen=True)
class PairDrift:
    """Two features that fire together more often or less often than before."""

    a: int
    b: int
    jaccard_base: float
    jaccard_tuned: float
    q_value: float


@dataclass(frozen=True, eq=False)
class LayerDrift:
    """The drift of one layer; arrays are `[d_sae]`."""

    layer: int
    sae: str
    tokens: int  # tokens that count in both stores
    l0: tuple[float, float]  # active features per token in base and tuned
    overlap: float  # mean over tokens of the Jaccard index of active sets
    cosine: float  # mean over tokens of the cosine of codes
    rate_base: Array  # share of tokens
    rate_tuned: Array
    strength_base: Array  # mean activation where it fires; 0 if it never fires
    strength_tuned: Array
    rate_q: Array  # of the change of the rate
    strength_q: Array  # of the change of the strength, on documents where it fires in both
    kind: Array  # index into KINDS
    pairs: tuple[PairDrift, ...]  # pairs whose co-firing changed, most certain first
    fvu: tuple[float, float] | None = None

    def count(self, kind: str) -> int:
        return int((self.kind == KINDS.index(kind)).sum())

    @property
    def changed(self) -> Array:
        """Which features changed. `-> bool [d_sae]`"""
        return self.kind != KINDS.index("same")

    def features(self, kind: str) -> list[int]:
        """Features of this kind, the largest change of rate (or of strength) first."""
        mine = np.flatnonzero(self.kind == KINDS.index(kind))
        base, tuned = (
            (self.strength_base, self.strength_tuned)
            if kind in ("stronger", "weaker")
            else (self.rate_base, self.rate_tuned)
        )
        order = np.argsort(-np.abs(tuned[mine] - base[mine]), kind="stable")
        return [int(feature) for feature in mine[order]]


@dataclass(frozen=True, eq=False, repr=False)
class Drift(View):
    """The drift of all common layers between two models."""

    base: str  # names of the models
    tuned: str
    layers: dict[int, LayerDrift]
    n_docs: int
    fdr: float

    def table(self, most: int | None = None) -> Table:
        """One row per layer."""
        rows = [
            (
                layer,
                one.overlap,
                one.cosine,
                *one.l0,
                *(one.fvu or (None, None)),
                *(one.count(kind) for kind in KINDS[:6]),
                len(one.pairs),
            )
            for layer, one in self.layers.items()
        ][:most]
        return Table.of(
            [*COLUMNS, *KINDS[:6], "pairs"],
            rows,
            above=(f"{self.base} -> {self.tuned}: {self.n_docs:,} documents, q <= {self.fdr:g}",),
            more=len(self.layers) - len(rows),
            formats={"L0 before": ".1f", "L0 after": ".1f"},
        )


def drift(
    base: FeatureStore,
    tuned: FeatureStore,
    layers: Iterable[int] | None = None,
    *,
    fdr: float = 0.05,
    fvu: dict[int, tuple[float, float]] | None = None,
) -> Drift:
    """Compare two stores of the same texts, token by token.

    `fvu` holds the unexplained variance of each layer in both models, if the caller measured it
    (`fidelity.py`), because a store has no residuals.
    """
    from tqdm import tqdm

    common = [layer for layer in base.layers if layer in tuned.layers]
    wanted = common if layers is None else sorted(set(layers))
    for layer in wanted:
        ours, theirs = base.sae(layer), tuned.sae(layer)
        if (ours.ref, ours.sha256) != (theirs.ref, theirs.sha256):
            raise StoreMismatch(
                f"layer {layer}: {ours.ref} against {theirs.ref} (files {ours.sha256[:12]} and"
                f" {theirs.sha256[:12]}). Drift needs the same SAE for both models; two SAEs are"
                " compared by `qsl compare match`"
            )
    if not wanted:
        raise StoreMismatch(
            f"no layer is in both stores: {base.layers} and {tuned.layers}. Extract the same layers"
        )
    _require_same_texts(base, tuned)
    bar = tqdm(wanted, unit="layer", desc="drift", disable=None)
    parts = {layer: side_by_side(base, tuned, layer) for layer in bar}
    rate_q = _across([part.rate_p for part in parts.values()])
    strength_q = _across([part.strength_p for part in parts.values()])
    pair_q = _across([part.pair_p for part in parts.values()])
    done = {
        layer: _finish(base, layer, part, rates, strengths, pairs, fdr, (fvu or {}).get(layer))
        for (layer, part), rates, strengths, pairs in zip(
            parts.items(), rate_q, strength_q, pair_q, strict=True
        )
    }
    return Drift(base.manifest.model.id, tuned.manifest.model.id, done, base.n_docs, fdr)


def _require_same_texts(base: FeatureStore, tuned: FeatureStore) -> None:
    if base.n_docs != tuned.n_docs or base.n_tokens != tuned.n_tokens:
        raise StoreMismatch(
            f"{base.n_docs} documents with {base.n_tokens} tokens against {tuned.n_docs} with"
            f" {tuned.n_tokens}: extract both stores from one corpus with one tokenizer"
        )
    if base.n_docs < 6:
        raise TooLittleData(
            f"{base.n_docs} documents: changes are tested over documents, and fewer than 6 can"
            " never be significant. Moderate changes need some hundreds"
        )


def _across(p_values: list[Array]) -> list[Array]:
    """q-values over all layers together, split by layer."""
    from scipy.stats import false_discovery_control

    joined = np.concatenate(p_values)
    q = false_discovery_control(joined) if len(joined) else joined
    return np.split(q, np.cumsum([len(p) for p in p_values])[:-1])


def _finish(
    base: FeatureStore,
    layer: int,
    part: SideBySide,
    rate_q: Array,
    strength_q: Array,
    pair_q: Array,
    fdr: float,
    fvu: tuple[float, float] | None,
) -> LayerDrift:
    rates = [count / part.tokens for count in part.count]
    strengths = [s / np.maximum(c, 1) for s, c in zip(part.total, part.count, strict=True)]
    moved, grown = rate_q <= fdr, rates[1] > rates[0]
    louder = strengths[1] > strengths[0]
    kind = np.select(
        [
            moved & (rates[1] > MANY_TIMES * rates[0]),
            moved & (rates[0] > MANY_TIMES * rates[1]),
            moved & grown,
            moved,
            (strength_q <= fdr) & louder,
            strength_q <= fdr,
        ],
        range(6),
        default=6,
    )
    order = np.argsort(pair_q, kind="stable")
    pairs = tuple(
        PairDrift(
            int(part.pairs[i, 0]),
            int(part.pairs[i, 1]),
            float(part.jaccard[0][i]),
            float(part.jaccard[1][i]),
            float(pair_q[i]),
        )
        for i in order.tolist()
        if pair_q[i] <= fdr
    )
    return LayerDrift(
        layer=layer,
        sae=base.sae(layer).ref,
        tokens=part.tokens,
        l0=part.l0,
        overlap=part.overlap,
        cosine=part.cosine,
        rate_base=rates[0],
        rate_tuned=rates[1],
        strength_base=strengths[0],
        strength_tuned=strengths[1],
        rate_q=rate_q,
        strength_q=strength_q,
        kind=kind,
        pairs=pairs,
        fvu=fvu,
    )


def facts(found: Drift) -> dict[str, Any]:
    """The figures of every layer, as plain values."""
    return {
        "base": found.base,
        "tuned": found.tuned,
        "documents": found.n_docs,
        "fdr": found.fdr,
        "rows": [
            {
                "layer": layer,
                "overlap": one.overlap,
                "cosine": one.cosine,
                "l0": one.l0,
                "fvu": one.fvu,
                **{kind: one.count(kind) for kind in KINDS[:6]},
                "pairs": len(one.pairs),
            }
            for layer, one in found.layers.items()
        ],
    }


def summary(found: Drift) -> Table:
    """One row per layer."""
    return found.table()


def drift_page(found: Drift, labels: dict[str, str] | None = None, link: str | None = None) -> Page:
    """The report as a page.

    `labels` maps addresses to descriptions. `link` is a site made by `qsl dash build`, or a pattern
    for other dashboards with {ref}, {layer} and {feature}.
    """
    labels = labels or {}
    page = Page(f"Drift: {found.base} to {found.tuned}")
    page.text(
        f"Both models read the same {found.n_docs:,} documents with the same SAEs. A change counts"
        " if more documents move in one direction than a fair coin explains (sign test over"
        f" documents), at a false-discovery rate of {found.fdr:g} over all features of all layers."
    )
    page.heading("Layer by layer")
    page.table([*COLUMNS.values(), *KINDS[:6], "pairs changed"], found.table().rows)
    page.text("; ".join(f"{kind}: {words}" for kind, words in MEANING.items()) + ".", quiet=True)
    page.text(
        "L0: active features per token. FVU: the share of the residual's variance that the SAE does"
        " not explain (a dash where it was not measured). Overlap of active sets: the Jaccard index"
        " of the features active on a token in both models. Rate: the share of tokens on which a"
        " feature fires; strength: its mean activation there. q: the smallest false-discovery rate"
        " at which the change counts.",
        quiet=True,
    )
    page.figure(
        chart(_by_layer(found)),
        "Overlap of active sets, averaged over tokens, and the share of features that changed",
    )
    for layer, one in found.layers.items():
        if not one.changed.any():
            continue
        page.heading(f"Layer {layer}: {int(one.changed.sum()):,} features changed")
        page.figure(
            chart(_rates(one)),
            "Share of tokens on which each feature fires, before and after. Red: changed features",
        )
        for kind in KINDS[:6]:
            features = one.features(kind)
            if features:
                page.text(f"{kind} ({MEANING[kind]}): {len(features):,}")
                page.table(*_feature_rows(one, features[:MOST_ROWS], labels, link))
        if one.pairs:
            page.text(f"Pairs that fire together more or less often: {len(one.pairs):,}")
            page.table(
                ["feature", "feature", "Jaccard before", "after", "q"],
                [
                    [str(p.a), str(p.b), p.jaccard_base, p.jaccard_tuned, f"{p.q_value:.1e}"]
                    for p in one.pairs[:MOST_ROWS]
                ],
            )
    return page


def _feature_rows(
    one: LayerDrift, features: list[int], labels: dict[str, str], link: str | None
) -> tuple[list[str], list[list[Any]]]:
    columns = ["feature", "rate before", "rate after", "strength before", "strength after", "q"]
    rows = []
    for f in features:
        ref = f"{one.sae}/{f}"
        q = min(one.rate_q[f], one.strength_q[f])
        row: list[Any] = [
            Link(ref, _target(link, ref)) if link else ref,
            f"{one.rate_base[f]:.3%}",
            f"{one.rate_tuned[f]:.3%}",
            float(one.strength_base[f]),
            float(one.strength_tuned[f]),
            f"{q:.1e}",
        ]
        rows.append([*row, labels.get(ref)] if labels else row)
    return [*columns, *(["label"] if labels else [])], rows


def _target(link: str, ref: str) -> str:
    if "{" not in link:
        link = link.rstrip("/") + "/index.html#{ref}"
    _, layer, feature = ref.rsplit("/", 2)
    return link.replace("{ref}", ref).replace("{layer}", layer).replace("{feature}", feature)


def _by_layer(found: Drift) -> Any:
    def draw(axes: Any) -> None:
        layers = list(found.layers)
        changed = [one.changed.mean() for one in found.layers.values()]
        axes.bar(layers, changed, width=0.6, color="#c0504d66", label="features changed")
        overlaps = [one.overlap for one in found.layers.values()]
        axes.plot(layers, overlaps, "o-", color="#4a7ebb", label="overlap of active sets")
        axes.set_xlabel("layer")
        axes.set_xticks(layers)
        axes.set_ylim(0, 1.05)
        axes.legend()

    return draw


def _rates(one: LayerDrift) -> Any:
    def draw(axes: Any) -> None:
        floor = 0.5 / one.tokens
        x, y = np.maximum(one.rate_base, floor), np.maximum(one.rate_tuned, floor)
        alive = (one.rate_base > 0) | (one.rate_tuned > 0)
        for mask, colour, size in (
            (alive & ~one.changed, "#80808055", 4),
            (alive & one.changed, "#c0504d", 7),
        ):
            axes.scatter(x[mask], y[mask], s=size, color=colour, linewidths=0, rasterized=False)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axline((floor, floor), (1, 1), color="#808080", linewidth=0.7)
        axes.set_xlabel("before")
        axes.set_ylabel("after")

    return draw
