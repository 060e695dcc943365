"""A drift as text and as an HTML report. Measuring it is `drift.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_scope_lens.compare.drift import KINDS, MANY_TIMES, Drift, LayerDrift
from qwen_scope_lens.pages import Link, Page, chart

__all__ = ["drift_page", "summary"]

MOST_ROWS = 25
MEANING = {
    "appeared": f"fires more than {MANY_TIMES:g} times as often",
    "vanished": f"fires less than a {MANY_TIMES:g}th as often",
    "more": "fires more often",
    "less": "fires less often",
    "stronger": "as often, but stronger",
    "weaker": "as often, but weaker",
}


def summary(found: Drift) -> str:
    """One line a layer."""
    lines = [
        f"{found.base} -> {found.tuned}: {found.n_docs:,} documents, q <= {found.fdr:g}",
        "layer  overlap  cosine      L0 before/after   FVU before/after  appeared  vanished"
        "   more   less  stronger  weaker  pairs",
    ]
    for layer, one in found.layers.items():
        fvu = "–" if one.fvu is None else f"{one.fvu[0]:.3f} / {one.fvu[1]:.3f}"
        counts = [one.count(kind) for kind in KINDS[:6]]
        lines.append(
            f"{layer:5}  {one.overlap:7.3f}  {one.cosine:6.3f}"
            f"  {one.l0[0]:9.1f} / {one.l0[1]:<7.1f}"
            f" {fvu:>17}  {counts[0]:8}  {counts[1]:8}  {counts[2]:5}  {counts[3]:5}"
            f"  {counts[4]:8}  {counts[5]:6}  {len(one.pairs):5}"
        )
    return "\n".join(lines)


def drift_page(found: Drift, labels: dict[str, str] | None = None, link: str | None = None) -> Page:
    """The report. `labels` maps addresses to words; `link` is a site of the features made by
    `qsl dash build`, or a pattern of other dashboards with {ref}, {layer} and {feature}."""
    labels = labels or {}
    page = Page(f"Drift: {found.base} to {found.tuned}")
    page.text(
        f"The same {found.n_docs:,} documents through both models, read by the same SAEs. A change"
        " counts when documents move in one direction more often than a fair coin would (sign test"
        f" over documents), at a false-discovery rate of {found.fdr:g} over all features of all"
        " layers."
    )
    page.heading("Layer by layer")
    rows = [
        [layer, one.overlap, one.cosine, *one.l0, *(one.fvu or (None, None)),
         *(one.count(kind) for kind in KINDS[:6]), len(one.pairs)]
        for layer, one in found.layers.items()
    ]  # fmt: skip
    page.table(
        ["layer", "overlap of active sets", "cosine of codes", "L0 before", "L0 after",
         "FVU before", "FVU after", *KINDS[:6], "pairs changed"],
        rows,
    )  # fmt: skip
    page.text("; ".join(f"{kind}: {words}" for kind, words in MEANING.items()) + ".", quiet=True)
    page.figure(chart(_by_layer(found)), "Overlap of a token's active features, and the share of"
                " features that changed")  # fmt: skip
    for layer, one in found.layers.items():
        if not one.changed.any():
            continue
        page.heading(f"Layer {layer}: {int(one.changed.sum()):,} features changed")
        page.figure(chart(_rates(one)), "Share of tokens on which each feature fires, before and"
                    " after; changed features are dark")  # fmt: skip
        for kind in KINDS[:6]:
            features = one.features(kind)
            if features:
                page.text(f"{kind} ({MEANING[kind]}): {len(features):,}")
                page.table(*_feature_rows(one, features[:MOST_ROWS], labels, link))
        if one.pairs:
            page.text(f"pairs that fire together more or less often: {len(one.pairs):,}")
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
        rows.append(
            [ref, f"{one.rate_base[f]:.3%}", f"{one.rate_tuned[f]:.3%}",
             float(one.strength_base[f]), float(one.strength_tuned[f]), f"{q:.1e}"]
        )  # fmt: skip
        if labels:
            rows[-1].append(labels.get(ref))
        if link:
            rows[-1][0] = Link(ref, _target(link, ref))
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
        axes.plot(layers, [one.overlap for one in found.layers.values()], "o-", color="#4a7ebb",
                  label="overlap of active sets")  # fmt: skip
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
