"""From feature stores to targets: the features that matter and that the seed data lacks.

The seed store holds the data that is to be completed. The reference store (anchor data) holds texts
of the task's domain: it says how strongly features fire, and has the passages that prompts show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadPlan, StoreMismatch, TooLittleData
from qwen_scope_lens.features.pool import firing, pool
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.labels.passages import Passages
from qwen_scope_lens.steering.calibrate import activity_in_store
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.synth.targets import Target, TargetSet, documents_firing

__all__ = ["features_to_describe", "find_targets", "passages_of", "with_passages"]

OPENING_TOKENS = 6
OPENINGS = 512
"""Openings are this many first tokens of anchor documents; so many openings are kept."""


def find_targets(
    seed: FeatureStore,
    reference: FeatureStore | None = None,
    *,
    relevance: Mapping[FeatureRef, float] | None = None,
    least_relevance: float = 0.5,
    threshold: float = 0.0,
    weak_below: int = 1,
    least_documents: int = 1,
    layers: Iterable[int] | None = None,
    labels: LabelPack | None = None,
    task: str = "",
    passages: int = 5,
) -> TargetSet:
    """Find the target features T, and how each fires in the seed and anchor data.

    Args:
        relevance: s_f by feature; features of `least_relevance` or more are targets. Without it
            every feature of the anchor data is a target.
        threshold: a feature fires in a document where its maximum exceeds this: 0 in the
            Qwen-Scope report, delta in FAC Synthesis.
        weak_below: features that fire on fewer seed documents than this are wanted, too.
        least_documents: a target has to fire on at least so many anchor documents.
        layers: only these layers; else all layers of the seed store.
        labels: descriptions of features for the prompts.
        passages: so many passages of the anchor data are kept for each missing feature.
    """
    if relevance is None and reference is None:
        raise TooLittleData(
            "nothing says which features matter: give labels, a judge or a contrast, or a"
            " --reference store, all features of which are then targets"
        )
    for name, number in (("threshold", threshold), ("least_relevance", least_relevance)):
        if not (math.isfinite(number) and number >= 0):
            raise BadPlan(f"{name} is {number!r}: expected a finite number, zero or more")
    chosen = _layers(seed, reference, layers)
    labels = labels or LabelPack()
    targets: list[Target] = []
    for layer in chosen:
        sae = LayerRef.parse(seed.sae(layer).ref)
        in_seed = documents_firing(pool(seed, layer), threshold)
        in_reference, typical = None, np.zeros(sae.row.d_sae)
        if reference is not None:
            maxima = pool(reference, layer)
            in_reference = documents_firing(maxima, threshold)
            typical = activity_in_store(reference, layer).typical.numpy()
        for feature in range(sae.row.d_sae):
            ref = sae.feature(feature) if relevance is not None else None
            score = relevance.get(ref, 0.0) if relevance is not None and ref else 1.0
            documents = None if in_reference is None else int(in_reference[feature])
            if score < least_relevance or (documents is not None and documents < least_documents):
                continue
            ref = sae.feature(feature)
            targets.append(
                Target(
                    ref,
                    float(score),
                    int(in_seed[feature]),
                    documents,
                    float(typical[feature]),
                    labels.text(ref),
                )
            )
    found = TargetSet(
        tuple(targets),
        task,
        threshold,
        weak_below,
        seed.n_docs,
        _openings(reference) if reference is not None else (),
        _provenance(seed, reference, least_relevance, least_documents),
    )
    return found if reference is None else with_passages(found, reference, passages)


def with_passages(targets: TargetSet, reference: FeatureStore, count: int) -> TargetSet:
    """The strongest passages of each wanted feature, for prompts."""
    found = passages_of(reference, [target.ref for target in targets.wanted], count)
    rows = (replace(t, examples=found.get(t.ref, t.examples)) for t in targets.targets)
    return replace(targets, targets=tuple(rows))


def passages_of(
    store: FeatureStore, refs: Iterable[FeatureRef], count: int
) -> dict[FeatureRef, tuple[str, ...]]:
    """The strongest passages of each feature, from different documents."""
    from qwen_scope_lens.features.statistics import statistics

    layers: dict[int, list[FeatureRef]] = {}
    for ref in refs:
        layers.setdefault(store.feature(ref)[0], []).append(ref)
    found: dict[FeatureRef, tuple[str, ...]] = {}
    if count < 1 or not layers:
        return found
    source = Passages(store)
    for layer, some in sorted(layers.items()):
        facts = statistics(store, layer, examples=count, sample=1, partners=1)
        for ref in some:
            found[ref] = tuple(source.top(layer, ref.feature, facts.top_examples(ref.feature)))
    return found


def _layers(
    seed: FeatureStore, reference: FeatureStore | None, layers: Iterable[int] | None
) -> list[int]:
    chosen = sorted(set(seed.layers if layers is None else layers))
    for layer in chosen:
        facts = seed.sae(layer)
        if reference is not None and reference.sae(layer) != facts:
            raise StoreMismatch(
                f"layer {layer}: {seed.path} was made with {facts.ref} and {reference.path} with"
                f" {reference.sae(layer).ref}, or with another file or dtype of it: make both"
                " stores with the same SAEs"
            )
    if reference is not None:
        seed.manifest.require_same(
            replace(reference.manifest, saes=seed.manifest.saes, settings=seed.manifest.settings),
            str(seed.path),
            str(reference.path),
        )
    return chosen


def _openings(store: FeatureStore) -> tuple[str, ...]:
    """Beginnings of documents, evenly spread over the store."""
    docs = np.unique(np.linspace(0, store.n_docs - 1, OPENINGS).round().astype(int))
    texts = store.documents(["text"])["text"]
    found = []
    for doc in docs.tolist():
        spans, text = store.spans(doc)[:OPENING_TOKENS], texts[doc].as_py()
        if text and len(spans) and (spans >= 0).all():
            found.append(text[: int(spans[-1, 1])])
    return tuple(dict.fromkeys(found))


def _provenance(
    seed: FeatureStore, reference: FeatureStore | None, least_relevance: float, least: int
) -> dict[str, object]:
    manifest = seed.manifest
    return {
        "model": manifest.model.id,
        "revision": manifest.model.revision,
        "dtype": manifest.model.dtype,
        "extreme_norm_ratio": manifest.settings.extreme_norm_ratio,
        "saes": {facts.ref: facts.sha256 for facts in manifest.saes.values()},
        "seed": [corpus.sha256 for corpus in manifest.corpora],
        "reference": [c.sha256 for c in reference.manifest.corpora] if reference else None,
        "least_relevance": least_relevance,
        "least_documents": least,
    }


def features_to_describe(
    store: FeatureStore,
    targets: Path | None = None,
    layer: int | None = None,
    features: Iterable[int] | None = None,
) -> list[FeatureRef]:
    """The wanted features of a targets file, or of a layer `features` or all that fire."""
    if targets is not None:
        return [target.ref for target in TargetSet.load(targets).wanted]
    if layer is None:
        raise BadPlan("no features to describe: give a targets file or a layer")
    if features is None:
        return firing(store, layer)
    sae = LayerRef.parse(store.sae(layer).ref)
    return [sae.feature(feature) for feature in features]
