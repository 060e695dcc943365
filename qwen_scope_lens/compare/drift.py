"""What changed between two models, in features: the same texts, the same SAE, two stores.

The unit is the document: tokens of one text are not independent. A change counts when documents
move in one direction more often than a fair coin would (sign test, exact, two-sided), with the
false-discovery rate controlled over all features of all layers. The page is `drift_page.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.compare.side_by_side import SideBySide, side_by_side
from qwen_scope_lens.errors import StoreMismatch, TooLittleData

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Drift", "LayerDrift", "PairDrift", "drift"]

Array = np.ndarray[Any, Any]

KINDS = ("appeared", "vanished", "more", "less", "stronger", "weaker", "same")
MANY_TIMES = 5.0


@dataclass(frozen=True)
class PairDrift:
    """Two features that fire together more or less often than before."""

    a: int
    b: int
    jaccard_base: float
    jaccard_tuned: float
    q_value: float


@dataclass(frozen=True, eq=False)
class LayerDrift:
    """One layer; arrays are `[d_sae]`."""

    layer: int
    sae: str
    tokens: int  # kept in both
    l0: tuple[float, float]  # base, tuned
    overlap: float  # Jaccard index of the active sets of a token, on average
    cosine: float  # of a token's codes, on average
    rate_base: Array  # share of tokens
    rate_tuned: Array
    strength_base: Array  # mean activation where it fires, 0 where it never does
    strength_tuned: Array
    rate_q: Array  # of the change of the rate
    strength_q: Array  # of the change of the strength, on documents where both fire
    kind: Array  # index into KINDS
    pairs: tuple[PairDrift, ...]  # co-firing that changed, most certain first
    fvu: tuple[float, float] | None = None

    def count(self, kind: str) -> int:
        return int((self.kind == KINDS.index(kind)).sum())

    @property
    def changed(self) -> Array:
        """bool `[d_sae]`"""
        return self.kind != KINDS.index("same")

    def features(self, kind: str) -> list[int]:
        """Of this kind, the largest change of rate (or of strength) first."""
        mine = np.flatnonzero(self.kind == KINDS.index(kind))
        base, tuned = (
            (self.strength_base, self.strength_tuned)
            if kind in ("stronger", "weaker")
            else (self.rate_base, self.rate_tuned)
        )
        order = np.argsort(-np.abs(tuned[mine] - base[mine]), kind="stable")
        return [int(feature) for feature in mine[order]]


@dataclass(frozen=True, eq=False)
class Drift:
    base: str  # the model's name
    tuned: str
    layers: dict[int, LayerDrift]
    n_docs: int
    fdr: float


def drift(
    base: FeatureStore,
    tuned: FeatureStore,
    layers: Iterable[int] | None = None,
    *,
    fdr: float = 0.05,
    fvu: dict[int, tuple[float, float]] | None = None,
) -> Drift:
    """Compare two stores of the same texts, token by token.

    `fvu` are the layers' unexplained variances in both models, where the caller measured them
    (`fidelity.py`); a store has no residuals.
    """
    from tqdm import tqdm

    common = [layer for layer in base.layers if layer in tuned.layers]
    wanted = common if layers is None else sorted(set(layers))
    for layer in wanted:
        ours, theirs = base.sae(layer), tuned.sae(layer)
        if (ours.ref, ours.sha256) != (theirs.ref, theirs.sha256):
            raise StoreMismatch(
                f"layer {layer}: {ours.ref} against {theirs.ref} (files {ours.sha256[:12]} and"
                f" {theirs.sha256[:12]}). Drift reads two models through one SAE; two SAEs are"
                " compared by `qsl compare match`"
            )
    if not wanted:
        raise StoreMismatch(
            f"no layer is in both stores: {base.layers} and {tuned.layers}. Extract the same ones"
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
            f"{base.n_docs} documents: a change is judged over documents, and fewer than 6 can"
            " never show one; some hundreds are needed to find moderate ones"
        )


def _across(p_values: list[Array]) -> list[Array]:
    """q-values over all layers together, given back layer by layer."""
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
