"""The table that SASFT needs: language features, and how high they stand on other languages.

What makes a feature one of a language (monolinguality), and the mean pre-activation of the chosen
ones on every language (alpha of Eq. 26), measured, kept as JSON. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, ScopeError, TooLittleData, UnknownName
from qwen_scope_lens.files import read_json, write_json

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.features.store import FeatureStore

__all__ = [
    "LanguageFeature",
    "LanguageFeatures",
    "find_language_features",
    "mean_activations",
    "monolinguality",
]

FORMAT, VERSION = "qsl-language-features", 1
TEXTS_PER_LANGUAGE = 100
"""As in the published code: texts a language for the means, first token left out."""


@dataclass(frozen=True)
class LanguageFeature:
    """One feature of one language."""

    ref: FeatureRef
    language: str
    monolinguality: float  # on the documents it was chosen by
    held_out: float  # on the others
    chance: float  # the best monolinguality in this layer when languages are shuffled
    pre_activation: Mapping[str, float]  # language -> mean before ReLU and top-k


@dataclass(frozen=True)
class LanguageFeatures:
    """The table: features of one or more languages, best first within language and layer."""

    model: str
    features: tuple[LanguageFeature, ...]
    settings: Mapping[str, Any]

    @property
    def languages(self) -> tuple[str, ...]:
        """Every language whose mean pre-activations are known."""
        return tuple(self.features[0].pre_activation)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({feature.ref.layer for feature in self.features}))

    def of(self, layer: int, targets: Sequence[str], most: int) -> list[LanguageFeature]:
        """The best `most` features of each target language in a layer."""
        found: list[LanguageFeature] = []
        for target in targets:
            here = [f for f in self.features if f.language == target and f.ref.layer == layer]
            if not here:
                known = sorted({f"{f.language} in layer {f.ref.layer}" for f in self.features})
                raise UnknownName(
                    f"the table has no feature of {target!r} in layer {layer}: it has"
                    f" {', '.join(known)}. Make one with `qsl train languages`"
                )
            found += here[:most]
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
            return cls(str(content["model"]), features, dict(content["settings"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ScopeError):
                raise
            raise BadFile(
                f"{path} is incomplete or damaged ({error!r}): make it again with"
                " `qsl train languages`"
            ) from error


def monolinguality(means: np.ndarray) -> np.ndarray:
    """`nu = mu - gamma`: a language's mean activation less the mean of the others' means.

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

    `-> [n_groups, d_sae]`, float64; a token on which a feature does not fire counts as 0.
    """
    return _Sums.of(store, layer).means(groups)


@dataclass(frozen=True)
class _Sums:
    """What every document of a layer adds up to, so that any grouping of them is one product."""

    values: csr_matrix  # [n_docs, d_sae], float64
    tokens: np.ndarray  # [n_docs], kept ones

    @classmethod
    def of(cls, store: FeatureStore, layer: int, docs: Iterable[int] | None = None) -> _Sums:
        from scipy.sparse import csr_matrix

        values = csr_matrix((store.n_docs, store.sae(layer).d_sae))
        tokens = np.zeros(store.n_docs)
        for block in store.iter_blocks(layer, keep=True, docs=docs):
            values += _indicator(np.asarray(block.doc), store.n_docs) @ block.codes.to_scipy_csr()
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
                "some language has no token that counts: its documents are too short"
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
    model: Any = None,
) -> LanguageFeatures:
    """The features of each target language, chosen on half of its documents, scored on the rest.

    `texts` documents of every language count (all, where there are fewer). `chance` is the best
    monolinguality that any feature reaches when documents change languages at random: a feature
    near it is none. The mean pre-activations need the model once more: by default the one the
    store was made with.
    """
    values = store.labels(label)
    languages = sorted({str(value) for value in values if value is not None})
    for target in targets:
        if target not in languages:
            raise UnknownName(
                f"no document has {label} {target!r}: the store has {', '.join(languages)}"
            )
    rng = np.random.default_rng(seed)
    first, second = [], []
    for language in languages:
        docs = np.flatnonzero([value is not None and str(value) == language for value in values])
        if len(docs) < 4:
            raise TooLittleData(
                f"{label} {language!r} has {len(docs)} documents: half of them choose and half"
                " score, so four are the least. Leave it out or add texts"
            )
        docs = rng.permutation(docs)[:texts]
        first.append(np.sort(docs[::2]))
        second.append(np.sort(docs[1::2]))
    wanted = tuple(layers) if layers is not None else store.layers
    chosen: list[LanguageFeature] = []
    for layer in wanted:
        sums = _Sums.of(store, layer, np.concatenate([*first, *second]))
        found, again = monolinguality(sums.means(first)), monolinguality(sums.means(second))
        chance = max(_shuffled(sums, first, rng) for _ in range(shuffles))
        for target in targets:
            row = languages.index(target)
            for feature in np.argsort(-found[row], kind="stable")[:per_layer].tolist():
                ref = LayerRef.parse(store.sae(layer).ref).feature(feature)
                scores = float(found[row, feature]), float(again[row, feature])
                chosen.append(LanguageFeature(ref, target, *scores, chance, {}))
    docs_of = {
        language: np.sort(np.concatenate(halves))
        for language, halves in zip(languages, zip(first, second, strict=True), strict=True)
    }
    settings = {"label": label, "texts": texts, "seed": seed, "shuffles": shuffles}
    features = tuple(_with_pre_activations(store, chosen, docs_of, model))
    return LanguageFeatures(str(store.manifest.model.id), features, settings)


def _shuffled(sums: _Sums, groups: Sequence[np.ndarray], rng: np.random.Generator) -> float:
    docs = rng.permutation(np.concatenate(groups))
    cuts = np.cumsum([len(group) for group in groups])[:-1]
    return float(monolinguality(sums.means(np.split(docs, cuts))).max())


def _with_pre_activations(
    store: FeatureStore,
    chosen: Sequence[LanguageFeature],
    docs_of: Mapping[str, np.ndarray],
    model: Any,
) -> list[LanguageFeature]:
    """Read the documents again and average the pre-activations of the chosen features alone."""
    import torch

    from qwen_scope_lens.models.capture import iter_captures
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.saes.load import load_sae
    from qwen_scope_lens.training.penalty import FeatureRows

    layers = sorted({feature.ref.layer for feature in chosen})
    if model is None:
        model = load_model(store.manifest.model.id, up_to_layer=layers[-1])
    saes = {layer: load_sae(store.sae(layer).ref) for layer in layers}
    numbers = {
        layer: list(dict.fromkeys(f.ref.feature for f in chosen if f.ref.layer == layer))
        for layer in layers
    }
    rows = {layer: FeatureRows.of(saes[layer], numbers[layer]) for layer in layers}
    texts = store.documents(["text"]).column("text").to_pylist()
    means: dict[tuple[str, int], torch.Tensor] = {}
    for language, docs in docs_of.items():
        sums = {layer: torch.zeros(len(numbers[layer]), dtype=torch.float64) for layer in layers}
        tokens = dict.fromkeys(layers, 0)
        for read in iter_captures(model, [texts[doc] for doc in docs], layers, truncate=True):
            for layer in layers:
                x = read.residuals[layer][read.keep(layer)]
                found = rows[layer].to(x.device).pre_activations(x)
                sums[layer] += found.double().sum(dim=0).cpu()
                tokens[layer] += len(x)
        for layer in layers:
            means[language, layer] = sums[layer] / max(1, tokens[layer])
    return [
        LanguageFeature(
            f.ref,
            f.language,
            f.monolinguality,
            f.held_out,
            f.chance,
            {
                language: float(
                    means[language, f.ref.layer][numbers[f.ref.layer].index(f.ref.feature)]
                )
                for language in docs_of
            },
        )
        for f in chosen
    ]
