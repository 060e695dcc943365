"""FeatureStore: the sparse features of a corpus, read by token, by feature or with SQL.

An open store shows what was finished when it was opened. Shards appear whole, so a store can be
opened while another process writes it; it then holds the first n_docs documents of the corpus, in
order. This module only reads: `extract.py` and `merge.py` write. The files are described in
`shard_files.py`, the facts about them in `manifest.py`.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import (
    LayerOutOfRange,
    StoreDamaged,
    StoreMismatch,
    UnknownName,
)
from qwen_scope_lens.files import is_url
from qwen_scope_lens.stores.blocks import Block, DocumentBlock, blocks_of, document_block
from qwen_scope_lens.stores.codec import Packed
from qwen_scope_lens.stores.manifest import Manifest, SAEFacts
from qwen_scope_lens.stores.shard_files import RESERVED, shard_folder
from qwen_scope_lens.stores.shard_reader import Shard, spans_of

if TYPE_CHECKING:
    from qwen_scope_lens.saes.codes import SparseCodes

__all__ = ["Block", "DocumentBlock", "FeatureStore", "Hits"]

T = TypeVar("T")

_AT_ONCE = 16

RECENT_TOKENS, RECENT_MAPS = 8, 1024
"""How many shards keep their tokens in memory, and how many keep their arrays mapped."""


@dataclass(frozen=True)
class Hits:
    """Where one feature fires, sorted by document and position."""

    doc: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n]
    value: np.ndarray  # float32 [n]
    _store: FeatureStore = field(repr=False)
    _layer: int = field(repr=False)

    def __len__(self) -> int:
        return len(self.doc)

    @cached_property
    def keep(self) -> np.ndarray:
        """bool `[n]`: neither the first token of its document nor of extreme norm."""
        return self._store.keep_at(self._layer, self.doc, self.position)


class FeatureStore:
    """A store on disk or at a URL, opened by `FeatureStore.open(path)`."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: Sequence[Shard], url: str | None = None
    ) -> None:
        self.path, self.manifest, self._shards = path, manifest, list(shards)
        self.url = url  # then `path` means nothing on this machine
        self._firsts = np.array([shard.first_doc for shard in shards], dtype=np.int64)
        self._with_tokens = _Recent(RECENT_TOKENS, Shard.forget_tokens)
        self._with_maps = _Recent(RECENT_MAPS, Shard.forget_maps)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FeatureStore:
        """Open a folder, or a URL such as `s3://bucket/store` (see `remote.py`)."""
        if is_url(path):
            from qwen_scope_lens.stores.remote import Remote, open_manifest

            url = str(path).rstrip("/")
            manifest = open_manifest(url)
            found = Remote.of(url).shards(range(manifest.n_shards))
            first = itertools.takewhile(found.__contains__, itertools.count())
            shards = [Shard(Path(url), n, manifest, found[n]) for n in first]
            return cls(Path(url), manifest, shards, url)
        folder = Path(path).expanduser()
        manifest = Manifest.open(folder)
        shards = []
        for number in range(manifest.n_shards):
            if not shard_folder(folder, number).is_dir():
                break
            shards.append(Shard(folder, number, manifest))
        return cls(folder, manifest, shards)

    def __repr__(self) -> str:
        saes = ", ".join(facts.ref for facts in self.manifest.saes.values())
        size = f"{self.n_docs:,} documents, {self.n_tokens:,} tokens"
        return f"FeatureStore({self.place}: {size}, {saes})"

    # What the store holds.

    @property
    def place(self) -> Path | str:
        """The folder or the URL, as messages name it."""
        return self.url or self.path

    @property
    def layers(self) -> tuple[int, ...]:
        return self.manifest.layers

    @property
    def n_docs(self) -> int:
        return sum(shard.n_docs for shard in self._shards)

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self._shards)

    def n_nonzero(self, layer: int) -> int:
        """How many (token, feature) pairs fire."""
        self.sae(layer)
        return sum(shard.n_nonzero[layer] for shard in self._shards)

    @property
    def is_complete(self) -> bool:
        """Whether all documents of its corpora are finished, not only the first ones."""
        return len(self._shards) == self.manifest.n_shards

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._shards)

    def sae(self, layer: int) -> SAEFacts:
        """The SAE of a layer; raises for a layer that was not stored."""
        return self.manifest.sae(layer, self.place)

    # Documents.

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.manifest.labels)

    def documents(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per document: doc, key, text, n_tokens, truncated and one column per label."""
        known = (*RESERVED, *self.label_names)
        for name in columns or ():
            if name not in known:
                raise UnknownName(f"no column {name!r} in {self.place}: it has {', '.join(known)}")
        tables = [_with_all(shard, self.manifest, columns) for shard in self._shards]
        if not tables:
            raise StoreDamaged(f"{self.place} has no finished document yet: let `qsl extract` run")
        return pa.concat_tables(tables, promote_options="permissive")

    def labels(self, name: str) -> np.ndarray:
        """The label of every document, None where a document has none. object `[n_docs]`"""
        if name not in self.manifest.labels:
            have = ", ".join(self.label_names) or "no labels"
            raise UnknownName(f"no label {name!r} in {self.place}: it has {have}")
        column = self.documents([name])[name].to_pylist()
        labels = np.empty(len(column), dtype=object)
        labels[:] = column
        return labels

    def spans(self, doc: int) -> np.ndarray:
        """Where each token stands in the document's text, in characters. int64 `[n, 2]`"""
        shard, rows = self._place(doc)
        return spans_of(shard.some_tokens(rows.start, rows.stop))

    def token_ids(self, doc: int) -> np.ndarray:
        """The token ids of one document, as the model read them. int64 `[n]`"""
        shard, rows = self._place(doc)
        ids: np.ndarray = shard.tokens["token_id"][rows].to_numpy().astype(np.int64)
        return ids

    # Codes.

    def iter_blocks(
        self, layer: int, keep: bool = False, docs: Iterable[int] | None = None
    ) -> Iterator[Block]:
        """The whole corpus in order, in blocks of whole documents; memory stays bounded.

        `keep` leaves out first tokens and tokens of extreme norm. With `docs` only these documents
        are visited, still in the corpus's order.
        """
        self.sae(layer)
        wanted = None if docs is None else np.unique(np.fromiter(map(int, docs), np.int64))
        if wanted is not None and len(wanted):
            self._check_doc(int(wanted[0]))
            self._check_doc(int(wanted[-1]))
        return self._blocks(layer, keep, wanted)

    def _blocks(self, layer: int, keep: bool, wanted: np.ndarray | None) -> Iterator[Block]:
        for shard in self._shards:
            self._use(shard)
            local = np.arange(shard.n_docs)
            if wanted is not None:
                local = wanted - shard.first_doc
                local = local[(local >= 0) & (local < shard.n_docs)]
            if not len(local):
                continue
            yield from blocks_of(shard, layer, local, keep)

    def by_token(self, doc: int, layer: int | None = None) -> DocumentBlock:
        """One document: which features fire on each of its tokens.

        `.codes` are the codes of `layer` (by default the last stored layer); `.layers` has the
        codes of every layer.
        """
        layer = self.layers[-1] if layer is None else layer
        self.sae(layer)
        shard, _ = self._place(doc)
        return document_block(shard, doc, layer, self.layers)

    def codes_at(self, layer: int, doc: Sequence[int], position: Sequence[int]) -> SparseCodes:
        """The codes of some tokens, in the order given. `[n] -> SparseCodes [n]`"""
        facts = self.sae(layer)
        docs, positions = np.asarray(doc, dtype=np.int64), np.asarray(position, dtype=np.int64)
        parts, order = [], []
        for shard, chosen, rows in self._places(docs, positions):
            parts.append(shard.packed(layer).take(rows))
            order.append(chosen)
        if not parts:
            import torch

            from qwen_scope_lens.saes.codes import SparseCodes

            return SparseCodes.from_dense(torch.zeros(0, facts.d_sae), facts.k)
        back = np.argsort(np.concatenate(order))
        return Packed.cat(parts).take(back).unpack()

    def keep_at(self, layer: int, doc: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Whether each of some tokens is neither first nor of extreme norm. bool `[n]`"""
        self.sae(layer)
        found = np.zeros(len(doc), dtype=bool)
        for shard, chosen, rows in self._places(doc, position):
            found[chosen] = shard.keep_rows(layer, rows)
        return found

    def by_feature(self, feature: str | FeatureRef | tuple[int, int]) -> Hits:
        """Where one feature fires. It is named by its address, or by (layer, number)."""
        layer, number = self.feature(feature)
        parts = self._of_shards(lambda shard: shard.hits(layer, number))
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        doc, position, value = (
            np.concatenate(column) for column in zip(empty, *parts, strict=True)
        )
        return Hits(doc, position, value, self, layer)

    def _of_shards(self, ask: Callable[[Shard], T]) -> list[T]:
        """The answer of each shard; those of a store at a URL are asked at the same time."""
        if self.url is None:
            found = []
            for shard in self._shards:
                self._with_maps.use(shard)
                found.append(ask(shard))
            return found
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(ask, self._shards))

    def hit_counts(self, layer: int) -> np.ndarray:
        """On how many tokens each feature fires, first and extreme ones counted. int64 `[d_sae]`

        Where every shard has `firing.npy`, no code is read for it.
        """
        total = np.zeros(self.sae(layer).d_sae, dtype=np.int64)
        for shard in self._shards:
            self._with_maps.use(shard)
            found = shard.firing(layer)
            if found is None:
                packed = shard.packed(layer)
                index = packed.indices()[packed.numbers() > 0]
                total += np.bincount(index, minlength=len(total))
            elif len(found[0]):
                if int(found[0].max()) >= len(total):
                    raise StoreDamaged(f"{shard.folder} counts features that the SAE lacks")
                total[found[0]] += np.diff(found[1].astype(np.int64), append=shard.n_nonzero[layer])
        return total

    def feature(self, feature: str | FeatureRef | tuple[int, int]) -> tuple[int, int]:
        """(layer, number) of a feature; raises for an address of another SAE."""
        if isinstance(feature, tuple):
            layer, number = feature
            if not 0 <= number < self.sae(layer).d_sae:
                raise LayerOutOfRange(
                    f"feature {number} is not in {self.sae(layer).ref}: it has"
                    f" 0..{self.sae(layer).d_sae - 1}"
                )
            return layer, number
        ref = FeatureRef.parse(feature)
        facts = self.manifest.saes.get(ref.layer)
        if facts is None or facts.ref != str(ref.sae):
            have = ", ".join(facts.ref for facts in self.manifest.saes.values())
            raise StoreMismatch(
                f"{ref} is a feature of {ref.sae}, {self.place} was made with {have}"
            )
        return ref.layer, ref.feature

    def sql(
        self, query: str, most_memory: int | None = None, most_seconds: float | None = None
    ) -> pa.Table:
        """Ask DuckDB about the views `features`, `documents` and `tokens`; it can only read.

        DuckDB uses at most `most_memory` bytes; None means 2 GiB. A query that takes longer than
        `most_seconds` raises `BadQuery`; None lets it take as long as it needs.
        """
        from qwen_scope_lens.stores.sql import MOST_MEMORY, run_query

        memory = MOST_MEMORY if most_memory is None else most_memory
        return run_query(self, query, memory, most_seconds)

    # Where documents and tokens stand.

    def _use(self, shard: Shard) -> None:
        self._with_tokens.use(shard)
        self._with_maps.use(shard)

    def _check_doc(self, doc: int) -> None:
        if not 0 <= doc < self.n_docs:
            more = "" if self.is_complete else " (the store is not complete yet)"
            raise LayerOutOfRange(
                f"document {doc} is not in {self.place}: it has 0..{self.n_docs - 1}{more}"
            )

    def _place(self, doc: int) -> tuple[Shard, slice]:
        self._check_doc(doc)
        shard = self._shards[int(np.searchsorted(self._firsts, doc, side="right")) - 1]
        self._use(shard)
        start, end = shard.offsets[doc - shard.first_doc : doc - shard.first_doc + 2].tolist()
        return shard, slice(start, end)

    def _places(
        self, docs: np.ndarray, positions: np.ndarray
    ) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """For every shard that has some of the tokens: which tokens, and in which of its rows."""
        if not len(docs):
            return
        self._check_doc(int(docs.min()))
        self._check_doc(int(docs.max()))
        at = np.searchsorted(self._firsts, docs, side="right") - 1
        for number in np.unique(at):
            shard = self._shards[int(number)]
            self._use(shard)
            [chosen] = np.nonzero(at == number)
            local = docs[chosen] - shard.first_doc
            rows = shard.offsets[local] + positions[chosen]
            wrong = (positions[chosen] < 0) | (rows >= shard.offsets[local + 1])
            if wrong.any():
                bad = chosen[wrong][0]
                raise LayerOutOfRange(f"document {docs[bad]} has no token {positions[bad]}")
            yield shard, chosen, rows


class _Recent:
    """The shards that were used last; when there are too many, the oldest frees its memory."""

    def __init__(self, most: int, forget: Callable[[Shard], None]) -> None:
        self._most, self._forget, self._shards = most, forget, OrderedDict[int, Shard]()

    def use(self, shard: Shard) -> None:
        self._shards[shard.number] = shard
        self._shards.move_to_end(shard.number)
        if len(self._shards) > self._most:
            self._forget(self._shards.popitem(last=False)[1])


def _with_all(shard: Shard, manifest: Manifest, columns: Sequence[str] | None) -> pa.Table:
    """The documents of a shard; labels that only later corpora have are null."""
    wanted = list(columns) if columns is not None else [*RESERVED, *manifest.labels]
    table = shard.table("documents.parquet")
    for name in wanted:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table)))
    return table.select(wanted)
