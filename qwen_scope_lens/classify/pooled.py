"""One row per document, one column per feature: what a classifier sees of stores.

`Pooled` is a CSR matrix whose columns know which SAE they belong to. It indexes by rows, so
scikit-learn's splitters take it as they take an array. Where the numbers come from (a store, or a
model at work) is `features/` and `read.py`; what is learned from them is `estimator.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qwen_scope_lens.errors import LayerOutOfRange, StoreMismatch
from qwen_scope_lens.features.pool import canonical, pool
from qwen_scope_lens.stores.manifest import Settings
from qwen_scope_lens.stores.reread import Reading

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "LayerFacts",
    "Pooled",
    "Source",
    "is_store",
    "pool_layers",
    "source_of_store",
    "stack_layers",
]


@dataclass(frozen=True)
class LayerFacts:
    """One SAE, as far as two artefacts have to agree on it."""

    ref: str  # mini-qwen3/w1k-l0-16/6
    d_sae: int
    k: int
    sha256: str | None = None

    @property
    def layer(self) -> int:
        return int(self.ref.rpartition("/")[2])

    def check_same(self, other: LayerFacts, what: str) -> None:
        """Raise where `other`, found in `what`, is another SAE."""
        mine, found = asdict(self), asdict(other)
        if None in (self.sha256, other.sha256):
            del mine["sha256"], found["sha256"]
        if mine != found:
            changed = ", ".join(
                f"{name} {mine[name]!r} here, {found[name]!r} there"
                for name in mine
                if mine[name] != found[name]
            )
            raise StoreMismatch(
                f"the classifier was fitted on {self.ref}; {what} has another SAE ({changed}):"
                " extract these documents with the SAE of the classifier, or fit it again"
            )


@dataclass(frozen=True)
class Source:
    """Where pooled values come from: model, SAEs, and how tokens became documents."""

    model: str
    layers: tuple[LayerFacts, ...]
    keep: bool = True  # first and extreme-norm tokens left out
    settings: Mapping[str, Any] = field(default_factory=dict)  # of reading, such as max_tokens
    dtype: str | None = None  # of the model's weights; None: as stored
    revision: str | None = None  # of the model

    def only(self, positions: Sequence[int]) -> Source:
        return replace(self, layers=tuple(self.layers[i] for i in positions))

    @property
    def reading(self) -> Reading:
        """The same, for reading texts with the model."""
        layers = tuple(facts.layer for facts in self.layers)
        return Reading(self.model, layers, Settings(**self.settings), self.dtype, self.revision)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Source:
        layers = tuple(LayerFacts(**facts) for facts in content["layers"])
        return cls(
            content["model"],
            layers,
            bool(content["keep"]),
            dict(content["settings"]),
            content["dtype"],
            content["revision"],
        )

    def check_same(self, other: Source, what: str) -> None:
        """Raise unless `other` reads the same model the same way, with all of these SAEs."""
        if self.model != other.model:
            raise StoreMismatch(
                f"the classifier was fitted on activations of {self.model}; {what} was read from"
                f" {other.model}: read it with {self.model}, or fit the classifier again"
            )
        if self.keep != other.keep:
            raise StoreMismatch(
                f"the classifier was fitted with keep={self.keep}, {what} is pooled with"
                f" keep={other.keep}: pool it the same way"
            )
        there = {facts.layer: facts for facts in other.layers}
        for facts in self.layers:
            if facts.layer not in there:
                raise StoreMismatch(
                    f"the classifier reads {facts.ref}; {what} has only layers"
                    f" {sorted(there)}: extract layer {facts.layer} too"
                )
            facts.check_same(there[facts.layer], what)


@dataclass(frozen=True, eq=False)
class Pooled:
    """`matrix [n_docs, sum of d_sae]`: the maximum over a document's tokens, layers side by side.

    `docs` are the documents' numbers in the store or the sequence they were read from.
    """

    matrix: csr_matrix
    source: Source
    docs: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", canonical(self.matrix))
        width = sum(facts.d_sae for facts in self.source.layers)
        if self.matrix.shape != (len(self.docs), width):
            raise StoreMismatch(
                f"a matrix of shape {self.matrix.shape} for {len(self.docs)} documents and {width}"
                " features: expected one row a document and one column a feature"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.matrix.shape[0]), int(self.matrix.shape[1])

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Pooled:
        """Some of the documents: numbers, a mask, or a slice (a trailing `...` is allowed)."""
        rows = key[0] if isinstance(key, tuple) else key
        rows = np.atleast_1d(rows) if not isinstance(rows, slice) else rows
        return Pooled(self.matrix[rows], self.source, self.docs[rows])

    @property
    def offsets(self) -> np.ndarray:
        """Where each layer's columns begin, and the end. `[layers + 1]`"""
        return np.cumsum([0, *(facts.d_sae for facts in self.source.layers)])

    def layer(self, number: int) -> csr_matrix:
        """The columns of one layer. `[n_docs, d_sae]`"""
        at = self.position(number)
        return self.matrix[:, self.offsets[at] : self.offsets[at + 1]]

    def layers(self, numbers: Iterable[int]) -> Pooled:
        """The same documents with these layers only, in this order."""
        from scipy.sparse import hstack

        positions = [self.position(number) for number in numbers]
        offsets = self.offsets
        parts = [self.matrix[:, offsets[i] : offsets[i + 1]] for i in positions]
        return Pooled(hstack(parts, format="csr"), self.source.only(positions), self.docs)

    def position(self, layer: int) -> int:
        """Which of the layers here is number `layer` of the model."""
        numbers = [facts.layer for facts in self.source.layers]
        if layer not in numbers:
            raise LayerOutOfRange(
                f"layer {layer} is not among those read: there are {numbers}. Extract it as well,"
                " or choose one of these"
            )
        return numbers.index(layer)

    def address(self, column: int) -> str:
        """The feature that a column stands for: `mini-qwen3/w1k-l0-16/6/498`."""
        at = int(np.searchsorted(self.offsets, column, side="right")) - 1
        return f"{self.source.layers[at].ref}/{column - int(self.offsets[at])}"

    def column(self, address: str) -> int:
        """Where a feature's column is."""
        sae, _, feature = address.rpartition("/")
        at = self.position(int(sae.rpartition("/")[2]))
        return int(self.offsets[at]) + int(feature)


def is_store(data: Any) -> bool:
    """Whether this is a feature store (or anything with a store's way of being read)."""
    return hasattr(data, "iter_blocks") and hasattr(data, "manifest")


def stack_layers(
    blocks: Sequence[csr_matrix], source: Source, docs: np.ndarray | None = None
) -> Pooled:
    """Layers side by side: one CSR matrix a layer, in the order of `source.layers`."""
    from scipy.sparse import hstack

    matrix = hstack(blocks, format="csr")
    return Pooled(matrix, source, np.arange(matrix.shape[0]) if docs is None else docs)


def pool_layers(
    stores: FeatureStore | Sequence[FeatureStore],
    layers: Iterable[int] | None = None,
    keep: bool = True,
    docs: Sequence[int] | np.ndarray | None = None,
) -> Pooled:
    """The documents of a store, or of several that hold other layers of the same documents.

    `keep` leaves out first and extreme-norm tokens; `docs` restricts to some documents.
    """
    some: list[Any] = [stores] if is_store(stores) else list(cast(Sequence[Any], stores))
    places: dict[int, Any] = {}
    for store in some:
        for number in store.layers:
            places.setdefault(number, store)
    wanted = sorted(places) if layers is None else list(layers)
    for number in wanted:
        if number not in places:
            raise LayerOutOfRange(
                f"layer {number} is not in the store: it has {sorted(places)}. Extract it as well,"
                " or choose one of these"
            )
    _check_same_documents(some)
    facts, blocks = [], []
    for number in wanted:
        store = places[number]
        facts.append(_facts(store, number))
        blocks.append(pool(store, number, how="max", keep=keep, docs=docs))
    source = replace(source_of_store(some[0], (), keep), layers=tuple(facts))
    numbers = np.arange(some[0].n_docs) if docs is None else np.asarray(docs)
    return stack_layers(blocks, source, numbers)


def source_of_store(store: FeatureStore, layers: Iterable[int], keep: bool = True) -> Source:
    """What a store says about itself, with these of its layers."""
    manifest = store.manifest
    return Source(
        manifest.model.id,
        tuple(_facts(store, number) for number in layers),
        keep,
        asdict(manifest.settings),
        manifest.model.dtype,
        manifest.model.revision,
    )


def _facts(store: FeatureStore, layer: int) -> LayerFacts:
    facts = store.sae(layer)
    return LayerFacts(facts.ref, facts.d_sae, facts.k, facts.sha256)


def _check_same_documents(stores: Sequence[Any]) -> None:
    first = stores[0]
    for other in stores[1:]:
        models = [store.manifest.model.id for store in (first, other)]
        if models[0] != models[1]:
            raise StoreMismatch(f"stores of different models: {models[0]} and {models[1]}")
        keys = [store.documents(["key"])["key"].to_pylist() for store in (first, other)]
        if keys[0] != keys[1]:
            raise StoreMismatch(
                f"the stores hold different documents ({len(keys[0])} and {len(keys[1])}): a list"
                " of stores means other layers of the same documents. Fit on one store of all"
            )
