"""Statistics of all features of a layer, from one pass over a store.

They say how often each feature fires, on how many documents, how strongly (sum, maximum,
histogram), on which tokens (top examples and a uniform sample), and together with which others.
Memory is a few hundred bytes per feature plus a bounded buffer, however large the store is. Texts
stay in the store: an example is a document and a position, and `store.spans(doc)[position]` is its
place in the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import LayerOutOfRange, TooLittleData
from qwen_scope_lens.features.best_entries import Best, place_hash
from qwen_scope_lens.features.cofiring import PAIR_TOKENS, Cofiring
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import Block, FeatureStore

__all__ = ["BIN_EDGES", "Example", "FeatureStatistics", "statistics"]

Array = np.ndarray[Any, Any]

LOWEST, BINS = -16, 56
BIN_EDGES = 2.0 ** (np.arange(LOWEST, LOWEST + BINS + 1) / 2)
"""The edges of the histogram's bins, half an octave each, from 2^-8 to 2^20.

Values outside are counted in the first or the last bin.
"""


@dataclass(frozen=True)
class Example:
    """A token on which a feature fires."""

    doc: int
    position: int
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class FeatureStatistics(View):
    """Statistics of all features of one layer; arrays have one row per feature, as in the SAE.

    Entries of the example and partner arrays that do not exist are -1 (documents, positions,
    partners).
    """

    sae: str  # address of the layer, GROUP/LAYER
    n_docs: int  # documents that were read
    n_tokens: int  # tokens that were counted: without first and extreme ones, unless keep=False
    kept_only: bool
    token_count: Array  # int64 [d_sae], tokens on which the feature fires
    doc_count: Array  # int64 [d_sae]
    total: Array  # float64 [d_sae], sum of its activations
    maximum: Array  # float32 [d_sae]
    histogram: Array  # int64 [d_sae, len(BIN_EDGES) - 1], activations by size
    top_doc: Array  # int64 [d_sae, m], strongest token of the m strongest documents, descending
    top_position: Array  # int32 [d_sae, m]
    top_value: Array  # float32 [d_sae, m]
    sample_doc: Array  # int64 [d_sae, r], a uniform sample of firing tokens, strongest first
    sample_position: Array  # int32 [d_sae, r]
    sample_value: Array  # float32 [d_sae, r]
    partner: Array  # int32 [d_sae, p], features that fire on the same tokens, closest first
    partner_count: Array  # int64 [d_sae, p], tokens on which both fire
    partner_jaccard: Array  # float32 [d_sae, p]
    pair_tokens: int  # tokens on which pairs were counted: all, or a sample
    bin_edges: Array = field(default_factory=lambda: BIN_EDGES)

    @property
    def d_sae(self) -> int:
        return len(self.token_count)

    @property
    def density(self) -> Array:
        """The share of tokens on which each feature fires. float64 `[d_sae]`"""
        return self.token_count / max(1, self.n_tokens)

    @property
    def document_frequency(self) -> Array:
        """The share of documents on which each feature fires. float64 `[d_sae]`"""
        return self.doc_count / max(1, self.n_docs)

    @property
    def mean_active(self) -> Array:
        """The mean activation where the feature fires, 0 where it never does. `[d_sae]`"""
        return self.total / np.maximum(1, self.token_count)

    @property
    def dead(self) -> Array:
        """Dead features: those that fired on none of the tokens. bool `[d_sae]`"""
        return self.token_count == 0

    @property
    def l0(self) -> float:
        """How many features fire per token, on average."""
        return float(self.token_count.sum() / max(1, self.n_tokens))

    def top_examples(self, feature: int) -> list[Example]:
        """The strongest token of each of its strongest documents, in descending order."""
        return self._examples(feature, self.top_doc, self.top_position, self.top_value)

    def sample_examples(self, feature: int) -> list[Example]:
        """A uniform sample of the tokens on which it fires, strongest first."""
        return self._examples(feature, self.sample_doc, self.sample_position, self.sample_value)

    def quantile_examples(self, feature: int, quantiles: Iterable[float]) -> list[Example]:
        """An example near each quantile of its activations (1 is the strongest)."""
        sample = self.sample_examples(feature)
        if not sample:
            return []
        last = len(sample) - 1
        return [sample[round((1 - min(max(q, 0.0), 1.0)) * last)] for q in quantiles]

    def top_pairs(self, n: int = 50, least: int = 10) -> list[tuple[int, int, int, float]]:
        """The closest pairs among every feature's partners: feature, feature, tokens, Jaccard.

        Only pairs that fire together on `least` tokens or more count: rare ones agree by chance.
        """
        a = np.repeat(np.arange(self.d_sae), self.partner.shape[1])
        b, count, score = (
            x.ravel() for x in (self.partner, self.partner_count, self.partner_jaccard)
        )
        good = (b >= 0) & (count >= least)
        low, high = np.minimum(a, b)[good], np.maximum(a, b)[good]
        _, once = np.unique(low.astype(np.int64) * self.d_sae + high, return_index=True)
        low, high, count, score = low[once], high[once], count[good][once], score[good][once]
        order = np.lexsort((high, low, -score))[:n]
        return [(int(low[i]), int(high[i]), int(count[i]), float(score[i])) for i in order]

    def table(self, most: int | None = None) -> Table:
        """One row per feature, the most frequent first."""
        chosen = np.argsort(-self.token_count, kind="stable")[:most]
        arrays = (self.density, self.document_frequency, self.mean_active, self.maximum)
        left_out = " (first and extreme ones left out)" if self.kept_only else ""
        return Table.of(
            ("feature", "tokens", "share of tokens", "of documents", "mean", "maximum"),
            zip(
                chosen.tolist(),
                self.token_count[chosen].tolist(),
                *(array[chosen].tolist() for array in arrays),
                strict=True,
            ),
            above=(
                f"{self.sae}: {self.n_tokens:,} tokens of {self.n_docs:,} documents{left_out}",
                f"features that fire: {int((~self.dead).sum()):,} of {self.d_sae:,};"
                f" {self.l0:.1f} per token",
            ),
            more=self.d_sae - len(chosen),
            formats={
                "share of tokens": ".3%",
                "of documents": ".1%",
                "mean": ".3g",
                "maximum": ".3g",
            },
            heat=("share of tokens", "of documents"),
        )

    def _examples(self, feature: int, doc: Array, position: Array, value: Array) -> list[Example]:
        if not 0 <= feature < self.d_sae:
            raise LayerOutOfRange(f"feature {feature}: {self.sae} has 0..{self.d_sae - 1}")
        return [
            Example(int(d), int(p), float(v))
            for d, p, v in zip(doc[feature], position[feature], value[feature], strict=True)
            if d >= 0
        ]


def statistics(
    store: FeatureStore,
    layer: int,
    *,
    keep: bool = True,
    docs: Iterable[int] | None = None,
    examples: int = 20,
    sample: int = 24,
    partners: int = 8,
    pair_tokens: int = PAIR_TOKENS,
) -> FeatureStatistics:
    """Read a layer of the store once and count.

    Args:
        keep: leave out first tokens and tokens of extreme norm, as every statistic does by default.
        docs: read only these documents.
        examples: the number of documents per feature whose strongest token is kept.
        sample: the number of tokens per feature that are kept at random, for quantile examples.
        partners: the number of co-firing features that are kept per feature.
        pair_tokens: if there are more tokens than this, pairs are counted on a sample of them.
    """
    from tqdm import tqdm

    facts = store.sae(layer)
    if not store.n_docs:
        raise TooLittleData(f"{store.place} has no finished document yet: let `qsl extract` run")
    chosen = None if docs is None else list(docs)
    counts = _Counts(facts.d_sae)
    top = Best(facts.d_sae, examples, one_per_doc=True)
    uniform = Best(facts.d_sae, sample, one_per_doc=False)
    pairs = Cofiring(facts.d_sae, pair_tokens)
    bar = tqdm(unit="token", unit_scale=True, desc=f"statistics, layer {layer}", disable=None)
    with bar:
        for block in store.iter_blocks(layer, keep=keep, docs=chosen):
            active = block.active
            row, entry = active.nonzero()
            feature = block.indices[row, entry].astype(np.int64)
            value = block.values[row, entry]
            doc, position = np.asarray(block.doc)[row], np.asarray(block.position)[row]
            counts.add(block, feature, doc, value)
            top.add(feature, doc, position, value, value.astype(np.float64))
            uniform.add(feature, doc, position, value, place_hash(doc, position, feature))
            places = np.asarray(block.doc), np.asarray(block.position)
            pairs.add(*places, block.indices, active)
            bar.update(len(block.doc))
    if not counts.n_tokens:
        raise TooLittleData(
            f"layer {layer} of this store has no tokens to count (first and extreme ones are left"
            " out by default: keep=False or --all-tokens counts them)"
        )
    top_doc, top_position, top_value = top.result()
    sampled = _strongest_first(*uniform.result())
    partner, partner_count, jaccard, pair_count = pairs.partners(partners)
    return FeatureStatistics(
        sae=str(facts.ref),
        n_docs=store.n_docs if chosen is None else len(set(chosen)),
        n_tokens=counts.n_tokens,
        kept_only=keep,
        token_count=counts.tokens,
        doc_count=counts.docs,
        total=counts.total,
        maximum=counts.maximum,
        histogram=counts.histogram,
        top_doc=top_doc,
        top_position=top_position,
        top_value=top_value,
        sample_doc=sampled[0],
        sample_position=sampled[1],
        sample_value=sampled[2],
        partner=partner,
        partner_count=partner_count,
        partner_jaccard=jaccard,
        pair_tokens=pair_count,
    )


class _Counts:
    """Sums over the blocks of a store."""

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.tokens = np.zeros(d_sae, dtype=np.int64)
        self.docs = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae, dtype=np.float64)
        self.maximum = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, BINS), dtype=np.int64)
        self._last_doc = -1
        self._seen = np.zeros(d_sae, dtype=bool)  # in the last document of the last block

    def add(self, block: Block, feature: Array, doc: Array, value: Array) -> None:
        d_sae = len(self.tokens)
        self.n_tokens += len(block.doc)
        self.tokens += np.bincount(feature, minlength=d_sae)
        self.total += np.bincount(feature, weights=value, minlength=d_sae)
        np.maximum.at(self.maximum, feature, value)
        bins = np.floor(2 * np.log2(value)).astype(np.int64) - LOWEST
        np.add.at(self.histogram.reshape(-1), feature * BINS + bins.clip(0, BINS - 1), 1)
        if not len(block.doc):
            return
        on_doc, fires = np.divmod(np.unique(doc * d_sae + feature), d_sae)
        # The tokens of a document are consecutive, but a block may end in the middle of one.
        again = (on_doc == self._last_doc) & self._seen[fires]
        self.docs += np.bincount(fires[~again], minlength=d_sae)
        last = int(np.asarray(block.doc)[-1])
        if last != self._last_doc:
            self._last_doc = last
            self._seen[:] = False
        self._seen[fires[on_doc == last]] = True


def _strongest_first(doc: Array, position: Array, value: Array) -> tuple[Array, Array, Array]:
    """Order each row by value, ties by document and position; missing entries stay last."""
    missing = np.where(doc < 0, np.inf, -value.astype(np.float64))
    order = np.lexsort((position, doc, missing), axis=1)
    return tuple(np.take_along_axis(a, order, axis=1) for a in (doc, position, value))  # type: ignore[return-value]
