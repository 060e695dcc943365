"""Language features for SASFT: how they are found, and the file that keeps them.

A feature belongs to a language by its monolinguality, which is compared with chance. The file also
holds the mean pre-activation of each feature on every language (`thresholds.py`), which is the
threshold of the loss. This module trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, ScopeError, TooLittleData, UnknownName
from qwen_scope_lens.features.document_sets import DocumentLabel, halves
from qwen_scope_lens.files import read_json, write_json

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.models.architecture import Model
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "LanguageFeature",
    "LanguageFeatures",
    "find_language_features",
    "mean_activations",
    "monolinguality",
]

FORMAT, VERSION = "qsl-language-features", 2  # version 1 ignored the store's token limit
TEXTS_PER_LANGUAGE = 100
"""Texts per language for the means, as in the published code."""


@dataclass(frozen=True)
class LanguageFeature:
    """One feature of one language."""

    ref: FeatureRef
    language: str
    monolinguality: float  # on the documents that chose it
    held_out: float  # monolinguality on the other documents
    chance: float  # largest monolinguality in this layer if languages are shuffled
    pre_activation: Mapping[str, float]  # language -> mean before ReLU and top-k

    @property
    def stands_out(self) -> bool:
        """Whether monolinguality is above chance, and positive on held-out documents."""
        return self.monolinguality > self.chance and self.held_out > 0


@dataclass(frozen=True)
class LanguageFeatures:
    """Features of one or more languages, best first within each layer and language."""

    model: str
    features: tuple[LanguageFeature, ...]
    settings: Mapping[str, Any]

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages with known mean pre-activations."""
        return tuple(self.features[0].pre_activation)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({feature.ref.layer for feature in self.features}))

    def of(
        self, layer: int, targets: Sequence[str], most: int, *, below_chance: bool = False
    ) -> list[LanguageFeature]:
        """Up to `most` of the best features of each target language in a layer.

        Features below chance are left out, unless `below_chance`. A target without any feature in
        the layer is refused.
        """
        found: list[LanguageFeature] = []
        for target in targets:
            here = [f for f in self.features if f.language == target and f.ref.layer == layer]
            if not here:
                known = sorted({f"{f.language} in layer {f.ref.layer}" for f in self.features})
                raise UnknownName(
                    f"the table has no feature of {target!r} in layer {layer}: it has"
                    f" {', '.join(known)}. Make one with `qsl train languages`"
                )
            good = [f for f in here if f.stands_out or below_chance]
            if not good:
                raise TooLittleData(
                    f"no feature of {target!r} in layer {layer} stands out from chance (the best"
                    f" has monolinguality {here[0].monolinguality:.3g}, chance reaches"
                    f" {here[0].chance:.3g}). Leave the layer out, make the table from more texts"
                    " with `qsl train languages`, or set below_chance to use it anyway"
                )
            found += good[:most]
        return found

    def save(self, path: Path) -> None:
        rows = [
            {
                "feature": str(f.ref),
                "language": f.language,
                "monolinguality": f.monolinguality,
                "held_out": f.held_out,
                "chance": f.chance,
                "pre_activation": dict(f.pre_activation),
            }
            for f in self.features
        ]
        content = {"model": self.model, "settings": dict(self.settings), "features": rows}
        write_json(path, FORMAT, VERSION, content)

    @classmethod
    def load(cls, path: Path) -> LanguageFeatures:
        content = read_json(path, FORMAT, VERSION, "qsl train languages")
        try:
            features = tuple(
                LanguageFeature(
                    FeatureRef.parse(row["feature"]),
                    str(row["language"]),
                    float(row["monolinguality"]),
                    float(row["held_out"]),
                    float(row["chance"]),
                    {str(key): float(value) for key, value in row["pre_activation"].items()},
                )
                for row in content["features"]
            )
            if len({frozenset(feature.pre_activation) for feature in features}) != 1:
                raise KeyError("the same languages for every feature")
            if not all(map(math.isfinite, _numbers(features))):
                raise ValueError("a number is not finite")
            return cls(str(content["model"]), features, dict(content["settings"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, ScopeError):
                raise
            raise BadFile(
                f"{path} is incomplete or damaged ({error!r}): make it again with"
                " `qsl train languages`"
            ) from error


def _numbers(features: Iterable[LanguageFeature]) -> list[float]:
    return [
        number
        for f in features
        for number in (f.monolinguality, f.held_out, f.chance, *f.pre_activation.values())
    ]


def monolinguality(means: np.ndarray) -> np.ndarray:
    """`nu = mu - gamma`: the mean activation on a language minus the mean over other languages.

    `[n_languages, d_sae] -> [n_languages, d_sae]`
    """
    count = len(means)
    if count < 2:
        raise TooLittleData("monolinguality compares languages: expected two or more, found one")
    return means - (means.sum(axis=0) - means) / (count - 1)


def mean_activations(
    store: FeatureStore, layer: int, groups: Sequence[Iterable[int]]
) -> np.ndarray:
    """Mean activation after top-k over the kept tokens of each group of documents.

    `-> float64 [n_groups, d_sae]`. Tokens on which a feature does not fire count as 0.
    """
    return _Sums.of(store, layer).means(groups)


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of each document, from which the means of any groups follow."""

    values: csr_matrix  # [n_docs, d_sae], float64
    tokens: np.ndarray  # [n_docs], number of kept tokens

    @classmethod
    def of(cls, store: FeatureStore, layer: int, docs: Iterable[int] | None = None) -> _Sums:
        from scipy.sparse import csr_matrix

        values = csr_matrix((store.n_docs, store.sae(layer).d_sae))
        tokens = np.zeros(store.n_docs)
        for block in store.iter_blocks(layer, keep=True, docs=docs):
            values += _indicator(np.asarray(block.doc), store.n_docs) @ block.matrix()
            tokens += np.bincount(block.doc, minlength=store.n_docs)
        return cls(values, tokens)

    def means(self, groups: Sequence[Iterable[int]]) -> np.ndarray:
        """`-> [n_groups, d_sae]`"""
        group_of = np.full(len(self.tokens), -1)
        for number, docs in enumerate(groups):
            group_of[list(docs)] = number
        inside = np.flatnonzero(group_of >= 0)
        chosen = _indicator(group_of[inside], len(groups))
        tokens = chosen @ self.tokens[inside]
        if not tokens.all():
            raise TooLittleData(
                "one of the languages has no token that counts: its documents are too short"
            )
        means: np.ndarray = (chosen @ self.values[inside]).toarray() / tokens[:, None]
        return means


def _indicator(row_of: np.ndarray, n_rows: int) -> csr_matrix:
    """A matrix that sums columns into rows. `[n] -> [n_rows, n]`"""
    from scipy.sparse import csr_matrix

    count = len(row_of)
    return csr_matrix((np.ones(count), (row_of, np.arange(count))), shape=(n_rows, count))


def find_language_features(
    store: FeatureStore,
    targets: Sequence[str],
    *,
    label: str = "lang",
    layers: Sequence[int] | None = None,
    per_layer: int = 2,
    texts: int = TEXTS_PER_LANGUAGE,
    shuffles: int = 20,
    seed: int = 0,
    model: Model | None = None,
) -> LanguageFeatures:
    """Find the features of each target language on half of its documents; score them on the rest.

    At most `texts` documents of each language count, and `per_layer` features of each language and
    layer are kept. Their `chance` is the largest monolinguality that any feature reaches when the
    documents' languages are shuffled `shuffles` times; features below it stay in the table, but the
    loss does not use them (`LanguageFeatures.of`). The table also has each feature's mean pre-
    activation per language, for which the model runs again (by default the one that filled the
    store). Raises `TooLittleData` if a language has fewer than four different documents.
    """
    rng = np.random.default_rng(seed)
    column = DocumentLabel.of(store, label)
    targets = list(dict.fromkeys(v for target in targets for v in sorted(column.find(target))))
    first, second = _halves(store, column, texts, rng)
    languages = list(first)
    wanted = tuple(layers) if layers is not None else store.layers
    chosen: list[LanguageFeature] = []
    for layer in wanted:
        choosing, scoring = list(first.values()), list(second.values())
        sums = _Sums.of(store, layer, np.concatenate([*choosing, *scoring]))
        found, again = monolinguality(sums.means(choosing)), monolinguality(sums.means(scoring))
        chance = max(_shuffled(sums, choosing, rng) for _ in range(shuffles))
        for target in targets:
            row = languages.index(target)
            for feature in np.argsort(-found[row], kind="stable")[:per_layer].tolist():
                ref = LayerRef.parse(store.sae(layer).ref).feature(feature)
                scores = float(found[row, feature]), float(again[row, feature])
                chosen.append(LanguageFeature(ref, target, *scores, chance, {}))
    docs_of = {name: np.sort(np.concatenate([first[name], second[name]])) for name in languages}
    from qwen_scope_lens.train.thresholds import mean_pre_activations

    means = mean_pre_activations(store, [f.ref for f in chosen], docs_of, model)
    limits = store.manifest.settings
    settings = {
        "label": label,
        "texts": texts,
        "seed": seed,
        "shuffles": shuffles,
        "max_tokens": limits.max_tokens,
    }
    features = tuple(replace(f, pre_activation=means[f.ref]) for f in chosen)
    return LanguageFeatures(str(store.manifest.model.id), features, settings)


def _halves(
    store: FeatureStore, label: DocumentLabel, texts: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The documents of each language that choose, and those that score; equal texts together."""
    content = store.documents(["text"])["text"].to_pylist()
    first, second = {}, {}
    for language in sorted(label.counts):
        docs = rng.permutation(np.flatnonzero([text == language for text in label.texts]))[:texts]
        here = [content[doc] for doc in docs.tolist()]
        different = len({text for text in here if text is not None}) + here.count(None)
        if different < 4:
            raise TooLittleData(
                f"{label.name} {language!r} has {different} different documents: half of them"
                " choose and half score, so four are the least. Leave it out or add texts"
            )
        chosen = halves(here)
        first[language], second[language] = np.sort(docs[chosen]), np.sort(docs[~chosen])
    return first, second


def _shuffled(sums: _Sums, groups: Sequence[np.ndarray], rng: np.random.Generator) -> float:
    docs = rng.permutation(np.concatenate(groups))
    cuts = np.cumsum([len(group) for group in groups])[:-1]
    return float(monolinguality(sums.means(np.split(docs, cuts))).max())
