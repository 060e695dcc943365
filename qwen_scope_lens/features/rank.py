"""Which features tell one group of documents from another, and how far that can be believed.

One part of the documents is for discovery: every feature of every layer is tested there, and the
false-discovery rate is controlled over all of them. The winners are scored again on the held-out
part, beside the controls of `controls.py`. `document_sets.py` chooses the documents, `contrast.py`
computes the tests and q-values, and `ranking.py` holds the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import TooLittleData, WrongShape
from qwen_scope_lens.features import controls
from qwen_scope_lens.features.contrast import Contrast, Correction, RankSums, contrast, q_values
from qwen_scope_lens.features.controls import Probe
from qwen_scope_lens.features.document_sets import Groups, by_documents, by_label, split
from qwen_scope_lens.features.pool import How
from qwen_scope_lens.features.ranking import RankedFeature, Ranking
from qwen_scope_lens.version import versions

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Measure", "RankedFeature", "Ranking", "rank"]

TEST = (
    "Mann-Whitney U, two-sided; below p = 0.1 with the exact distribution of how many firing"
    " documents are positive, above it the normal approximation"
)

Measure = Literal["auroc", "effect", "mean_difference", "rate_difference"]
MEASURES = get_args(Measure)
DETAILS = ("mean_positive", "mean_negative", "rate_positive", "rate_negative", "p_value")


@dataclass(frozen=True)
class _Layer:
    layer: int
    discovery: Contrast
    held_out: Contrast
    shuffled_auroc: np.ndarray[Any, Any]
    shuffled_p: np.ndarray[Any, Any]
    probes: list[Probe]


def rank(
    store: FeatureStore,
    positive: str | Sequence[str] | Sequence[int] | np.ndarray[Any, Any],
    negative: str | Sequence[str] | Sequence[int] | np.ndarray[Any, Any] | None = None,
    *,
    label: str | None = None,
    layers: int | Iterable[int] | None = None,
    pool: How = "max",
    keep: bool = True,
    by: Measure = "auroc",
    top: int = 50,
    both_sides: bool = False,
    fdr: float = 0.05,
    correction: Correction = "bh",
    min_documents: int = 3,
    held_out: float = 0.3,
    shuffles: int = 10,
    residuals: Mapping[int, np.ndarray[Any, Any]] | None = None,
    seed: int = 0,
    layer: int | Iterable[int] | None = None,
) -> Ranking:
    """Rank the features of some layers by how well they tell positive from negative documents.

    Args:
        positive, negative: with `label`, values of that label; without it, document numbers or
            masks. By default the negatives are all other documents (that have the label).
        layers: one layer, several, or None for all that the store has. The false-discovery rate is
            controlled over all of them together.
        pool: how the tokens of a document become one number: max, mean, any, or last.
        keep: leave out first tokens and tokens of extreme norm (`last` always reads the last).
        by: the measure that orders the winners; ties are ordered by AUROC, effect, then address.
        both_sides: rank features that are higher in the negatives, too.
        fdr, correction: q-values of the test must not exceed `fdr`. "bh" is Benjamini-Hochberg,
            "by" Benjamini-Yekutieli, which is stricter and needs no assumption about how features
            depend on each other.
        min_documents: features that fire on fewer discovery documents are not tested.
        held_out: the share of documents on which the winners are scored again.
        shuffles: how often the whole ranking is repeated on shuffled labels.
        residuals: `{layer: [n_docs, d_model]}` of the whole store, for probes on the residual.
        layer: the older name of `layers`.
    """
    if layer is not None:
        warnings.warn("layer= is now called layers=", DeprecationWarning, stacklevel=2)
        layers = layer if layers is None else layers
    from qwen_scope_lens.features.pool import pool as pool_documents

    if by not in get_args(Measure) or correction not in get_args(Correction):
        raise TooLittleData(
            f"by={by!r}, correction={correction!r}: expected one of {', '.join(get_args(Measure))}"
            f" and one of {', '.join(get_args(Correction))}"
        )
    groups = (
        by_documents(store.n_docs, positive, negative)  # type: ignore[arg-type]
        if label is None
        else by_label(store, label, positive, negative)  # type: ignore[arg-type]
    )
    numbers = _layers(store, layers)
    texts = store.documents(["text"])["text"].to_pylist()
    discovery, held = split(
        groups.positive, [texts[doc] for doc in groups.docs.tolist()], held_out, seed
    )
    _require_enough(groups, discovery, held)
    results = []
    for number in numbers:
        x = pool_documents(store, number, how=pool, keep=keep, docs=groups.docs)
        sums = RankSums(x[np.flatnonzero(discovery)])
        labels = groups.positive[discovery]
        fitted = controls.probes(x, groups.positive, discovery, held, "features", number)
        if residuals is not None:
            dense = _residuals_of(store, residuals, number)[groups.docs]
            fitted += controls.probes(dense, groups.positive, discovery, held, "residual", number)
        results.append(
            _Layer(
                number,
                contrast(sums, labels),
                contrast(x[np.flatnonzero(held)], groups.positive[held]),
                *controls.shuffled_tests(sums, labels, shuffles, seed + 1),
                fitted,
            )
        )
    settings = {
        **groups.said,
        "layers": numbers,
        "pool": pool,
        "keep": keep,
        "by": by,
        "both_sides": both_sides,
        "test": TEST,
        "fdr": fdr,
        "correction": correction,
        "min_documents": min_documents,
        "held_out": held_out,
        "shuffles": shuffles,
        "seed": seed,
    }
    refs = [str(store.sae(number).ref) for number in numbers]
    documents = {
        f"{side}_{part}": int((mask & (groups.positive == (side == "positive"))).sum())
        for side in ("positive", "negative")
        for part, mask in (("discovery", discovery), ("held_out", held))
    }
    return _ranking(results, refs, settings, documents, top, _provenance(store, numbers))


def _ranking(
    results: list[_Layer],
    refs: list[str],
    settings: dict[str, Any],
    documents: dict[str, int],
    top: int,
    provenance: dict[str, Any],
) -> Ranking:
    """Put all layers together: control the false-discovery rate, order the winners, compare."""

    def joined(part: str, name: str) -> np.ndarray[Any, Any]:
        return np.concatenate([getattr(getattr(result, part), name) for result in results])

    auroc, effect = joined("discovery", "auroc"), joined("discovery", "effect")
    tested = joined("discovery", "documents") >= settings["min_documents"]
    q = q_values(joined("discovery", "p_value"), tested, settings["correction"])
    differs = tested & (q <= settings["fdr"])  # on either side
    passed = differs.copy()
    sizes = [len(result.discovery.auroc) for result in results]
    layer_of = np.repeat(np.arange(len(results)), sizes)
    feature_of = np.concatenate([np.arange(size) for size in sizes])
    measure = {"auroc": auroc - 0.5}.get(settings["by"])
    if measure is None:
        measure = joined("discovery", settings["by"])
    if settings["both_sides"]:
        order = np.lexsort((-np.abs(effect), -np.abs(auroc - 0.5), -np.abs(measure)))
    else:
        passed &= (auroc > 0.5) & (measure > 0)
        order = np.lexsort((-effect, -auroc, -measure))
    winners = order[passed[order]]
    best = winners[:top]
    rows = []
    for at in best.tolist():
        result, feature = results[layer_of[at]], int(feature_of[at])
        here, there = result.discovery, result.held_out
        rows.append(
            RankedFeature(
                ref=str(LayerRef.parse(refs[layer_of[at]]).feature(feature)),
                q_value=float(q[at]),
                **{name: float(getattr(here, name)[feature]) for name in (*MEASURES, *DETAILS)},
                **{f"held_out_{name}": float(getattr(there, name)[feature]) for name in MEASURES},
            )
        )
    held_auroc = joined("held_out", "auroc")
    rng = np.random.default_rng(settings["seed"] + 2)
    others = np.flatnonzero(tested & ~differs)
    drawn = rng.choice(others, size=min(len(others), max(100, len(best))), replace=False)
    alike = [
        matched + offset
        for number, (result, offset) in enumerate(
            zip(results, np.cumsum([0, *sizes[:-1]]), strict=True)
        )
        for matched in [
            controls.matched(
                best[layer_of[best] == number] - offset,
                others[layer_of[others] == number] - offset,
                result.discovery,
            )
        ]
    ]
    baselines = tuple(
        controls.baseline(name, features, auroc, held_auroc)
        for name, features in (
            ("winners", best),
            ("random features", drawn),
            ("features alike in rate and strength", np.concatenate(alike)),
        )
    )
    return Ranking(
        rows=tuple(rows),
        found=len(winners),
        tested=int(tested.sum()),
        documents=documents,
        settings=settings,
        shuffled=controls.summarise_shuffles(
            np.concatenate([result.shuffled_auroc for result in results]),
            np.concatenate([result.shuffled_p for result in results]),
            tested,
            settings["fdr"],
            settings["correction"],
        ),
        baselines=baselines,
        probes=tuple(probe for result in results for probe in result.probes),
        provenance=provenance,
    )


def _layers(store: FeatureStore, layers: int | Iterable[int] | None) -> list[int]:
    if layers is None:
        return list(store.layers)
    wanted = [layers] if isinstance(layers, int) else sorted(set(layers))
    for number in wanted:
        store.sae(number)  # raises where the store has no such layer
    return wanted


def _require_enough(groups: Groups, discovery: Any, held: Any) -> None:
    for part, mask in (("discovery", discovery), ("held out", held)):
        inside = int((mask & groups.positive).sum())
        outside = int((mask & ~groups.positive).sum())
        if min(inside, outside) < 2:
            raise TooLittleData(
                f"{inside} positive and {outside} negative documents in the part for {part}: at"
                " least 2 of each are needed (documents with the same text stay in one part). Add"
                " documents, or change held_out"
            )


def _residuals_of(store: FeatureStore, residuals: Mapping[int, Any], layer: int) -> Any:
    found = residuals.get(layer)
    if found is None or found.ndim != 2 or len(found) != store.n_docs:
        raise WrongShape(
            f"residuals[{layer}]: expected [{store.n_docs}, d_model], found"
            f" {None if found is None else tuple(found.shape)}"
        )
    return np.asarray(found)


def _provenance(store: FeatureStore, layers: list[int]) -> dict[str, Any]:
    return {
        "saes": {str(number): asdict(store.sae(number)) for number in layers},
        "model": _plain(store.manifest.model),
        "n_docs": store.n_docs,
        "n_tokens": store.n_tokens,
        "versions": versions("scipy"),
    }


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
