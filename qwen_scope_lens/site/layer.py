"""Everything that a page says about the features of one layer, from store, SAE and model.

`gather` reads the store and the weights once for all features; `LayerPages.pages` then makes the
pages of any run of features. `static.py` and `neuronpedia.py` write the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import StoreMismatch
from qwen_scope_lens.features.document_sets import DocumentLabel
from qwen_scope_lens.features.statistics import Example, FeatureStatistics, statistics
from qwen_scope_lens.features.token_effects import Neighbours, TokenEffects, nearest, token_effects
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.saes.sae import ScopeSAE
from qwen_scope_lens.site.passages import Passage, PassageReader

if TYPE_CHECKING:
    from qwen_scope_lens.labels.packs import Label, LabelPack
    from qwen_scope_lens.models.unembedding import Unembedding
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "MOST_VALUES",
    "Breakdown",
    "FeaturePage",
    "Geometry",
    "LayerPages",
    "Settings",
    "break_down",
    "gather",
]

MOST_VALUES = 30
"""A label with more values, or with as many as documents (a key, a number), tells documents apart
and not kinds of them."""


@dataclass(frozen=True)
class Breakdown:
    """One label: its values, how many tokens each value has, and on how many each feature fires."""

    name: str
    values: tuple[str, ...]
    tokens: np.ndarray  # int64 [values]
    fired: np.ndarray  # int64 [d_sae, values]

    def of(self, feature: int) -> list[tuple[str, int, int]]:
        """Rows of value, tokens where the feature fires, all tokens; the largest share first."""
        share = self.fired[feature] / np.maximum(1, self.tokens)
        order = np.lexsort((np.arange(len(share)), -share))
        return [
            (self.values[i], int(self.fired[feature, i]), int(self.tokens[i]))
            for i in order.tolist()
        ]


def break_down(store: FeatureStore, layer: int) -> list[Breakdown]:
    """Every label of the store that has few values, from one pass over the layer."""
    d_sae = store.sae(layer).d_sae
    codes_of: dict[str, np.ndarray] = {}
    found: dict[str, Breakdown] = {}
    for name in store.label_names:
        label = DocumentLabel.of(store, name)
        column, values, known = label.texts, sorted(label.counts), label.counts.total()
        if not 2 <= len(values) <= min(MOST_VALUES, known // 2):
            continue
        number = {value: i for i, value in enumerate(values)} | {None: -1}
        codes_of[name] = np.array([number[value] for value in column])
        zeros = np.zeros(len(values), np.int64)
        found[name] = Breakdown(
            name, tuple(values), zeros, np.zeros((d_sae, len(values)), np.int64)
        )
    if not found:
        return []
    for block in store.iter_blocks(layer, keep=True):
        active = block.entries.values > 0
        row, _ = active.nonzero()
        feature = block.entries.indices[active].astype(np.int64)
        for name, entry in found.items():
            kind, width = codes_of[name][block.doc], len(entry.values)
            entry.tokens[:] += np.bincount(kind[kind >= 0], minlength=width)
            known = kind[row] >= 0
            at = feature[known] * width + kind[row][known]
            entry.fired[:] += np.bincount(at, minlength=d_sae * width).reshape(d_sae, width)
    return list(found.values())


@dataclass(frozen=True)
class Settings:
    """How much a page shows."""

    examples: int = 12
    quantiles: tuple[float, ...] = (0.9, 0.75, 0.5, 0.25, 0.1)
    each: int = 2  # examples a quantile
    tokens: int = 10  # promoted, and as many suppressed
    neighbours: int = 8
    across: int = 3  # neighbours in each other layer
    before: int = 24  # tokens around an example
    after: int = 10


@dataclass(frozen=True)
class Geometry:
    """The weights of each feature, `[d_sae]`."""

    decoder_norm: np.ndarray
    encoder_norm: np.ndarray
    cosine: np.ndarray  # of the direction it writes with the one it reads
    bias: np.ndarray

    def of(self, feature: int) -> dict[str, float]:
        return {name: float(column[feature]) for name, column in vars(self).items()}


@dataclass(frozen=True)
class FeaturePage:
    """One feature."""

    feature: int
    label: Label | None
    top: list[Passage]
    quantiles: list[tuple[float, list[Passage]]]

    def peaks(self, most: int = 5) -> list[str]:
        """The tokens of the feature's strongest examples, the most frequent first."""
        counts: dict[str, int] = {}
        for passage in self.top:
            token = passage.pieces[passage.peak]
            counts[token] = counts.get(token, 0) + 1
        return sorted(counts, key=lambda token: -counts[token])[:most]


@dataclass(frozen=True, eq=False)
class LayerPages:
    """One layer, ready to be written."""

    ref: LayerRef
    k: int
    stats: FeatureStatistics
    near: Neighbours
    geometry: Geometry
    groups: list[Breakdown]
    effects: TokenEffects | None  # None: the model was not at hand
    vocabulary: Vocabulary
    reader: PassageReader
    settings: Settings
    directions: torch.Tensor  # [d_sae, d_model]
    labels: Mapping[int, Label] = field(default_factory=dict)
    across: Sequence[tuple[LayerRef, Neighbours]] = ()  # the nearest features of other layers

    def pages(self, features: Sequence[int]) -> list[FeaturePage]:
        wanted: list[tuple[int, int, int]] = []  # feature, document, position
        counts: list[tuple[int, list[tuple[float, int]]]] = []
        for feature in features:
            top = self.stats.top_examples(feature)[: self.settings.examples]
            spread = self._spread(feature)
            shown = [*top, *(example for _, group in spread for example in group)]
            wanted += [(feature, example.doc, example.position) for example in shown]
            counts.append((len(top), [(quantile, len(group)) for quantile, group in spread]))
        columns = np.array(wanted, dtype=np.int64).reshape(-1, 3).T
        passages = iter(self.reader.read(*columns) if len(wanted) else [])
        out = []
        for feature, (n_top, quantiles) in zip(features, counts, strict=True):
            top_passages = [next(passages) for _ in range(n_top)]
            groups = [(q, [next(passages) for _ in range(size)]) for q, size in quantiles]
            out.append(FeaturePage(feature, self.labels.get(feature), top_passages, groups))
        return out

    def _spread(self, feature: int) -> list[tuple[float, list[Example]]]:
        """Examples around each quantile of a uniform sample of where it fires; none twice."""
        sample = self.stats.sample_examples(feature)
        groups, used = [], 0
        for quantile in self.settings.quantiles:
            place = round((1 - quantile) * (len(sample) - 1))
            first = max(used, place)
            used = max(used, min(len(sample), place + self.settings.each))
            if first < used:
                groups.append((quantile, sample[first:used]))
        return groups


def gather(
    store: FeatureStore,
    layer: int,
    vocabulary: Vocabulary,
    out: Unembedding | None = None,
    *,
    sae: ScopeSAE,
    labels: LabelPack | None = None,
    settings: Settings | None = None,
    others: Iterable[tuple[LayerRef, torch.Tensor]] = (),
    progress: bool = False,
) -> LayerPages:
    """Without `out` (norm and unembedding), pages have no promoted and suppressed tokens.

    `others` are the directions `[d_sae, d_model]` of other layers, in which each feature's nearest
    are found. They are taken one after the other, so an iterator needs memory for one.
    """
    settings = settings or Settings()
    facts = store.sae(layer)
    ref = LayerRef.parse(facts.ref)
    if sae.cfg.d_sae != facts.d_sae:
        raise StoreMismatch(
            f"the store was made with {facts.d_sae} features of {ref}, this SAE has"
            f" {sae.cfg.d_sae}: give the folder of the SAE that `qsl extract` used"
        )
    stats = statistics(
        store,
        layer,
        examples=settings.examples,
        sample=4 * settings.each * len(settings.quantiles),
        partners=settings.neighbours,
    )
    directions = sae.W_dec.detach().float().contiguous()
    across = [
        (other, nearest(directions, settings.across, progress=progress, among=theirs))
        for other, theirs in others
    ]
    effects = None
    if out is not None:
        effects = token_effects(
            directions, out, settings.tokens, vocabulary=len(vocabulary), progress=progress
        )
    return LayerPages(
        ref=ref,
        k=facts.k,
        stats=stats,
        near=nearest(directions, settings.neighbours, progress=progress),
        geometry=_geometry(sae, directions),
        groups=break_down(store, layer),
        effects=effects,
        vocabulary=vocabulary,
        reader=PassageReader(store, layer, vocabulary, settings.before, settings.after),
        settings=settings,
        directions=directions,
        labels=labels.of_sae(ref) if labels is not None else {},
        across=across,
    )


def _geometry(sae: ScopeSAE, directions: torch.Tensor) -> Geometry:
    reads = sae.W_enc.detach().T  # [d_sae, d_in], row-major where the file is
    decoder, encoder, cosine = [], [], []
    for write, read in zip(directions.split(4096), reads.split(4096), strict=True):
        read = read.float()
        decoder.append(write.norm(dim=-1))
        encoder.append(read.norm(dim=-1))
        cosine.append(torch.nn.functional.cosine_similarity(write, read, dim=-1))
    return Geometry(
        decoder_norm=torch.cat(decoder).numpy(),
        encoder_norm=torch.cat(encoder).numpy(),
        cosine=torch.cat(cosine).numpy(),
        bias=sae.b_enc.detach().float().numpy(),
    )
