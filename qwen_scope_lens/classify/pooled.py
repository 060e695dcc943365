"""One row per document and one column per feature: the data of a classifier.

`Pooled` is a CSR matrix that knows the SAE of each column. It is indexed by rows, so scikit-learn's
splitters take it like an array. Stores are pooled here; `read.py` makes the same matrix from texts
with a model, and `estimator.py` learns from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qwen_scope_lens.errors import LayerOutOfRange, StoreMismatch
from qwen_scope_lens.features.pool import canonical, pool
from qwen_scope_lens.stores.manifest import Settings
from qwen_scope_lens.stores.reread import StoreReader

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
    """What identifies an SAE when two files or stores are compared."""

    ref: str  # mini-qwen3/w1k-l0-16/6
    d_sae: int
    k: int
    sha256: str | None = None

    @property
    def layer(self) -> int:
        return int(self.ref.rpartition("/")[2])

    def check_same(self, other: LayerFacts, what: str) -> None:
        """Raise if `other`, which was found in `what`, is a different SAE."""
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
                f"the classifier was fitted on {self.ref}; {what} has another SAE ({changed})."
                " Extract these documents with the SAE of the classifier, or fit it again"
            )


@dataclass(frozen=True)
class Source:
    """Where pooled values come from: the model, the SAEs, and how documents were read."""

    model: str
    layers: tuple[LayerFacts, ...]
    keep: bool = True  # first and extreme-norm tokens left out
    settings: Mapping[str, Any] = field(default_factory=dict)  # such as max_tokens
    dtype: str | None = None  # of the model's weights; None: the dtype of the checkpoint
    revision: str | None = None  # of the model

    def only(self, positions: Sequence[int]) -> Source:
        return replace(self, layers=tuple(self.layers[i] for i in positions))

    @property
    def reading(self) -> StoreReader:
        """The same, for reading texts with the model."""
        layers = tuple(facts.layer for facts in self.layers)
        return StoreReader(self.model, layers, Settings(**self.settings), self.dtype, self.revision)

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
        """Raise unless `other` has the same model, way of pooling, and all of these SAEs."""
        if self.model != other.model:
            raise StoreMismatch(
                f"the classifier was fitted on activations of {self.model}; {what} was read from"
                f" {other.model}. Read it with {self.model}, or fit the classifier again"
            )
        if self.keep != other.keep:
            raise StoreMismatch(
                f"the classifier was fitted with keep={self.keep}, but {what} is pooled with"
                f" keep={other.keep}. Pool it the same way"
            )
        there = {facts.layer: facts for facts in other.layers}
        for facts in self.layers:
            if facts.layer not in there:
                raise StoreMismatch(
                    f"the classifier reads {facts.ref}, but {what} has only layers"
                    f" {sorted(there)}. Extract layer {facts.layer} too"
                )
            facts.check_same(there[facts.layer], what)


@dataclass(frozen=True, eq=False)
class Pooled:
    """Maxima of features over the tokens of each document: `matrix [n_docs, sum of d_sae]`.

    The columns of the layers follow one another. `docs` are the numbers of the documents in the
    store or sequence that they were read from.
    """

    matrix: csr_matrix
    source: Source
    docs: np.ndarray
    tokens: np.ndarray | None = None  # in each document, where that is known

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", canonical(self.matrix))
        width = sum(facts.d_sae for facts in self.source.layers)
        if self.matrix.shape != (len(self.docs), width):
            raise StoreMismatch(
                f"a matrix of shape {self.matrix.shape} for {len(self.docs)} documents and {width}"
                " features: expected one row per document and one column per feature"
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
        """Some of the documents, by numbers, a mask or a slice (a trailing `...` is allowed)."""
        rows = key[0] if isinstance(key, tuple) else key
        rows = np.atleast_1d(rows) if not isinstance(rows, slice) else rows
        tokens = None if self.tokens is None else self.tokens[rows]
        return Pooled(self.matrix[rows], self.source, self.docs[rows], tokens)

    @property
    def offsets(self) -> np.ndarray:
        """The first column of each layer, and the end of the last one. `-> [layers + 1]`"""
        return np.cumsum([0, *(facts.d_sae for facts in self.source.layers)])

    def layer(self, number: int) -> csr_matrix:
        """The columns of one layer. `-> [n_docs, d_sae]`"""
        at = self.position(number)
        return self.matrix[:, self.offsets[at] : self.offsets[at + 1]]

    def layers(self, numbers: Iterable[int]) -> Pooled:
        """The same documents with only these layers, in this order."""
        from scipy.sparse import hstack

        positions = [self.position(number) for number in numbers]
        offsets = self.offsets
        parts = [self.matrix[:, offsets[i] : offsets[i + 1]] for i in positions]
        matrix = hstack(parts, format="csr")
        return Pooled(matrix, self.source.only(positions), self.docs, self.tokens)

    def position(self, layer: int) -> int:
        """The position of the model's layer `layer` among the layers here."""
        numbers = [facts.layer for facts in self.source.layers]
        if layer not in numbers:
            raise LayerOutOfRange(
                f"layer {layer} is not among those read, {numbers}. Extract it as well, or choose"
                " one of these"
            )
        return numbers.index(layer)

    def address(self, column: int) -> str:
        """The address of the feature in a column, such as `mini-qwen3/w1k-l0-16/6/498`."""
        at = int(np.searchsorted(self.offsets, column, side="right")) - 1
        return f"{self.source.layers[at].ref}/{column - int(self.offsets[at])}"

    def column(self, address: str) -> int:
        """The column of a feature."""
        sae, _, feature = address.rpartition("/")
        at = self.position(int(sae.rpartition("/")[2]))
        return int(self.offsets[at]) + int(feature)


def is_store(data: Any) -> bool:
    """Whether this is a feature store, or an object that can be read like one."""
    return hasattr(data, "iter_blocks") and hasattr(data, "manifest")


def stack_layers(
    blocks: Sequence[csr_matrix],
    source: Source,
    docs: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
) -> Pooled:
    """Join one CSR matrix per layer, in the order of `source.layers`."""
    from scipy.sparse import hstack

    matrix = hstack(blocks, format="csr")
    return Pooled(matrix, source, np.arange(matrix.shape[0]) if docs is None else docs, tokens)


def pool_layers(
    stores: FeatureStore | Sequence[FeatureStore],
    layers: Iterable[int] | None = None,
    keep: bool = True,
    docs: Sequence[int] | np.ndarray | None = None,
) -> Pooled:
    """Pool the documents of a store, or of several stores with layers of the same documents.

    `keep` leaves out first and extreme-norm tokens. `docs` selects documents by their numbers.
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
                f"layer {number} is not in the store, which has {sorted(places)}. Extract it as"
                " well, or choose one of these"
            )
    _check_same_documents(some)
    facts, blocks = [], []
    for number in wanted:
        store = places[number]
        facts.append(_facts(store, number))
        blocks.append(pool(store, number, how="max", keep=keep, docs=docs))
    source = replace(source_of_store(some[0], (), keep), layers=tuple(facts))
    numbers = np.arange(some[0].n_docs) if docs is None else np.asarray(docs)
    tokens = some[0].documents(["n_tokens"])["n_tokens"].to_numpy()[numbers]
    return stack_layers(blocks, source, numbers, tokens)


def source_of_store(store: FeatureStore, layers: Iterable[int], keep: bool = True) -> Source:
    """The source that a store's manifest describes, with these of its layers."""
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
                f"the stores hold different documents ({len(keys[0])} and {len(keys[1])}). Several"
                " stores have to hold layers of the same documents: fit on one store of all"
            )
