"""One finished shard, read: its tokens, the codes of its rows, the hits of a feature.

`blocks_of` and `document_block` make what the methods of `store.py` return: the tokens of whole
documents with their codes. `shard_files.py` writes the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope_lens.errors import BadFile, StorageUnreachable, StoreDamaged
from qwen_scope_lens.files import open_regular, read_json
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.stores.codec import OVERFLOW, Packed
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.shard_files import REPAIR, SHARD_FORMAT, layer_folder, shard_folder

if TYPE_CHECKING:
    from qwen_scope_lens.stores.remote import RemoteShard

__all__ = [
    "BLOCK_TOKENS",
    "Block",
    "DocumentBlock",
    "Shard",
    "blocks_of",
    "document_block",
    "spans_of",
]

BLOCK_TOKENS = 16384
"""The most tokens per block, unless a single document is longer."""


class Shard:
    """One finished shard. Its arrays are memory-mapped and read when they are needed.

    Opening it reads `shard.json` and raises `StoreDamaged` if that contradicts the manifest. The
    files of a shard at a URL (`remote`) are copied to this machine when they are needed.
    """

    def __init__(
        self, store: Path, number: int, manifest: Manifest, remote: RemoteShard | None = None
    ) -> None:
        self.folder, self.number, self._manifest = shard_folder(store, number), number, manifest
        self.remote = remote
        where = self.folder if remote is None else remote.url
        try:
            if remote is None:
                facts = read_json(self.folder / "shard.json", *SHARD_FORMAT, "qsl extract")
            else:
                facts = remote.facts()
            self.first_doc, self.n_docs = int(facts["first_doc"]), int(facts["n_docs"])
            self.n_tokens = int(facts["n_tokens"])
            self.n_nonzero = {int(layer): int(n) for layer, n in facts["n_nonzero"].items()}
            self.files: dict[str, dict[str, Any]] = facts["files"]
            if set(self.n_nonzero) != set(manifest.layers):
                raise ValueError(f"n_nonzero names the layers {sorted(self.n_nonzero)}")
            if min(self.n_docs, self.n_tokens, *self.n_nonzero.values()) < 0:
                raise ValueError("a count is negative")
            if not all(type(each["size"]) is int for each in self.files.values()):
                raise ValueError("the size of a file is not a whole number")
        except (BadFile, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreDamaged(f"{where}: {error}. {REPAIR}") from error
        if (self.first_doc, self.first_doc + self.n_docs) != manifest.corpus_of(number).span(
            number
        ):
            raise StoreDamaged(f"{where} holds other documents than the manifest says")
        self._packed: dict[int, Packed] = {}
        self._groups: dict[int, tuple[pq.FileMetaData, np.ndarray, np.ndarray]] = {}

    def path(self, name: str) -> Path:
        """A file of the shard, on this machine."""
        return self.folder / name if self.remote is None else self.remote.fetch(name)

    def features_path(self, layer: int) -> Path:
        return self.path(_features(layer))

    @contextlib.contextmanager
    def _ranges(self, name: str) -> Iterator[Any]:
        """A file that is read in parts; one at a URL is not copied to this machine for that."""
        if self.remote is not None:
            with self.remote.open(name) as file:
                yield file
            return
        path = self.path(name)
        with open_regular(path), pa.OSFile(str(path)) as file:
            yield file

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 `[n_docs + 1]`: where the tokens of each document begin."""
        found = self._array("offsets.npy", mapped=False)
        good = found.shape == (self.n_docs + 1,) and found.dtype == np.int64
        if not good or found[0] or found[-1] != self.n_tokens or (np.diff(found) < 0).any():
            raise StoreDamaged(
                f"{self.path('offsets.npy')} does not lead from 0 to {self.n_tokens} tokens in"
                f" {self.n_docs} steps. {REPAIR}"
            )
        return found

    def packed(self, layer: int) -> Packed:
        """The codes of all tokens in a layer, as views of the files."""
        if layer not in self._packed:
            name = layer_folder(Path(), layer)
            optional = {
                part: self._array((name / f"{part}.npy").as_posix())
                if (name / f"{part}.npy").as_posix() in self.files
                else None
                for part in ("indices_high", "overflow")
            }
            overflow = optional["overflow"]
            packed = Packed(
                low=self._array((name / "indices.npy").as_posix()),
                high=optional["indices_high"],
                values=self._array((name / "values.npy").as_posix()),
                overflow=np.zeros(0, OVERFLOW) if overflow is None else np.array(overflow),
                d_sae=self._manifest.saes[layer].d_sae,
            )
            if problem := self._misfit(packed, self._manifest.saes[layer].k):
                raise StoreDamaged(f"{self.folder}/{name}: {problem}. {REPAIR}")
            self._packed[layer] = packed
        return self._packed[layer]

    def _misfit(self, packed: Packed, k: int) -> str | None:
        """What is wrong with the arrays of one layer, as far as it shows without reading them."""
        arrays = [(packed.low, "<u2"), (packed.values, "<f2")]
        arrays += [] if packed.high is None else [(packed.high, "|u1")]
        if any(array.shape != (self.n_tokens, k) for array, _ in arrays):
            shapes = ", ".join(str(array.shape) for array, _ in arrays)
            return f"the arrays do not fit together: {shapes}, expected {(self.n_tokens, k)}"
        if any(array.dtype != np.dtype(kind) for array, kind in arrays):
            return "an array has another type than was written"
        if (packed.high is None) != (packed.d_sae <= 1 << 16):
            return f"indices_high.npy does not fit an SAE of {packed.d_sae} features"
        at = packed.overflow["at"] if packed.overflow.dtype == OVERFLOW else None
        if at is None or at.ndim != 1:
            return "overflow.npy has another type than was written"
        if len(at) and (at[0] < 0 or at[-1] >= packed.low.size or (np.diff(at) <= 0).any()):
            return "overflow.npy names places that are not there"
        return None

    @cached_property
    def tokens(self) -> pa.Table:
        """Everything of `tokens.parquet` but the strings; remembered until `forget_tokens`."""
        columns = ["token_id", "start", "end"]
        columns += [f"extreme_{layer}" for layer in self._manifest.layers]
        return self.table("tokens.parquet", columns)

    def forget_tokens(self) -> None:
        self.__dict__.pop("tokens", None)

    def forget_maps(self) -> None:
        """Close the files that `packed` opened (once nothing uses them any more)."""
        self._packed.clear()

    def token_ids(self) -> np.ndarray:
        return self.tokens["token_id"].to_numpy().astype(np.int64)

    def spans(self) -> np.ndarray:
        """int64 `[T, 2]`; -1 where a document was given as token ids."""
        return spans_of(self.tokens)

    def keep(self, layer: int) -> np.ndarray:
        """bool `[T]`: neither the first token of its document nor of extreme norm."""
        keep = ~self.tokens[f"extreme_{layer}"].to_numpy(zero_copy_only=False)
        if not self.has_last_tokens:
            starts = self.offsets[:-1]
            keep[starts[starts < self.n_tokens]] = False
        return keep

    def keep_rows(self, layer: int, rows: np.ndarray) -> np.ndarray:
        """`keep` of some rows, from the few row groups that have them. bool `[n]`"""
        meta, ends = self._token_groups
        name = f"extreme_{layer}"
        if name not in meta.schema.names:
            raise StoreDamaged(f"{self._place('tokens.parquet')} has no column {name}. {REPAIR}")
        groups, at = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
        try:
            with self._ranges("tokens.parquet") as file:
                table = pq.ParquetFile(file, metadata=meta).read_row_groups(
                    groups.tolist(), columns=[name], use_threads=False
                )
        except StorageUnreachable:
            raise
        except (OSError, pa.ArrowException) as error:
            place = self._place("tokens.parquet")
            raise StoreDamaged(f"{place} cannot be read: {error}. {REPAIR}") from error
        starts = np.concatenate([[0], ends])[groups]
        found = np.cumsum([0, *(ends[groups] - starts)[:-1]])  # where each group begins in `table`
        keep: np.ndarray = ~table[name].to_numpy(zero_copy_only=False)[
            rows - starts[at] + found[at]
        ]
        if not self.has_last_tokens:
            keep &= rows != self.offsets[np.searchsorted(self.offsets, rows, side="right") - 1]
        return keep

    @property
    def has_last_tokens(self) -> bool:
        """Whether the only stored token of a document is its last one, not its first."""
        return self._manifest.settings.last_token

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            with open_regular(self.path(name)) as file:
                table = pq.read_table(file, columns=columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreDamaged(f"{self.path(name)} cannot be read: {error}. {REPAIR}") from error
        if missing := [column for column in columns or () if column not in table.column_names]:
            raise StoreDamaged(f"{self.path(name)} has no column {missing[0]}. {REPAIR}")
        rows = {"documents.parquet": self.n_docs, "tokens.parquet": self.n_tokens}
        if len(table) != rows.get(name, len(table)):
            raise StoreDamaged(
                f"{self.path(name)} has {len(table)} rows, {rows[name]} were written. {REPAIR}"
            )
        return table

    def some_tokens(self, start: int, end: int) -> pa.Table:
        """Rows start..end of `tokens.parquet`, strings included, without reading all others."""
        meta, ends = self._token_groups
        first, last = np.searchsorted(ends, [start, end - 1], side="right").tolist()
        path = self.path("tokens.parquet")
        try:
            with pq.ParquetFile(path, metadata=meta) as file:
                table = file.read_row_groups(list(range(first, last + 1)), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise StoreDamaged(f"{path} cannot be read: {error}. {REPAIR}") from error
        skipped = int(ends[first - 1]) if first else 0
        return table.slice(start - skipped, end - start)

    @cached_property
    def _token_groups(self) -> tuple[pq.FileMetaData, np.ndarray]:
        """The footer of `tokens.parquet`, and the row at which each of its row groups ends."""
        meta = self._footer("tokens.parquet")
        ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        if (found := int(ends[-1]) if len(ends) else 0) != self.n_tokens:
            raise StoreDamaged(
                f"{self._place('tokens.parquet')} has {found} rows, {self.n_tokens} were written."
                f" {REPAIR}"
            )
        return meta, ends

    def _footer(self, name: str) -> pq.FileMetaData:
        try:
            with self._ranges(name) as file:
                return pq.read_metadata(file)
        except StorageUnreachable:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreDamaged(f"{self._place(name)} cannot be read: {error}. {REPAIR}") from error

    def hits(self, layer: int, feature: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """doc, position, value of one feature, from the few row groups that can have it."""
        if layer not in self._groups:
            self._groups[layer] = self._open_groups(layer)
        meta, low, high = self._groups[layer]
        groups = np.nonzero((low <= feature) & (feature <= high))[0].tolist()
        if not groups:
            none = np.zeros(0, np.int64)
            return none, none, np.zeros(0, np.float32)
        try:
            with self._ranges(_features(layer)) as file:
                table = pq.ParquetFile(file, metadata=meta).read_row_groups(
                    groups, columns=["feature", "doc", "position", "value"], use_threads=False
                )
        except StorageUnreachable:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StoreDamaged(
                f"{self._place(_features(layer))} cannot be read: {error}. {REPAIR}"
            ) from error
        found = table["feature"].to_numpy()
        rows = slice(*np.searchsorted(found, [feature, feature + 1]).tolist())
        doc, position, value = (
            table[name].to_numpy()[rows] for name in ("doc", "position", "value")
        )
        return doc.astype(np.int64), position.astype(np.int64), value

    def _open_groups(self, layer: int) -> tuple[pq.FileMetaData, np.ndarray, np.ndarray]:
        """The footer, and the least and the greatest feature of every row group."""
        meta = self._footer(_features(layer))
        at = meta.schema.names.index("feature")
        ranges = [meta.row_group(i).column(at).statistics for i in range(meta.num_row_groups)]
        low = np.array([r.min for r in ranges if r is not None], dtype=np.int64)
        return meta, low, np.array([r.max for r in ranges if r is not None], dtype=np.int64)

    def _place(self, name: str) -> str:
        """The name of a file in messages."""
        return str(self.folder / name) if self.remote is None else f"{self.remote.url}/{name}"

    def _array(self, name: str, mapped: bool = True) -> np.ndarray:
        try:
            with open_regular(self.path(name)):  # a FIFO would be waited for
                return np.load(self.path(name), mmap_mode="r" if mapped else None)
        except (OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError) as error:
            raise StoreDamaged(f"{self.path(name)} cannot be read: {error}. {REPAIR}") from error


def _features(layer: int) -> str:
    return (layer_folder(Path(), layer) / "features.parquet").as_posix()


def spans_of(tokens: pa.Table) -> np.ndarray:
    """int64 `[n, 2]` of rows of `tokens.parquet`; -1 where there is no text."""
    columns = [tokens[name].fill_null(-1).to_numpy() for name in ("start", "end")]
    return np.stack(columns, axis=1).astype(np.int64)


@dataclass(frozen=True)
class Block:
    """The tokens of some whole documents in one layer, one row per token."""

    doc: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n]
    token_ids: np.ndarray  # int64 [n]
    keep: np.ndarray  # bool [n]: neither a first token nor one of extreme norm
    codes: SparseCodes  # [n]

    def __len__(self) -> int:
        return len(self.doc)


@dataclass(frozen=True)
class DocumentBlock(Block):
    """The tokens of one document."""

    tokens: list[str]
    spans: np.ndarray  # int64 [n, 2]: characters of the text; -1 where there is no text
    layers: dict[int, SparseCodes]  # every layer of the store


def blocks_of(shard: Shard, layer: int, local: np.ndarray, keep: bool) -> Iterator[Block]:
    """Blocks of some documents of a shard; `local` has their numbers within the shard."""
    token_ids, keeps, packed = shard.token_ids(), shard.keep(layer), shard.packed(layer)
    for group in _groups(local, np.diff(shard.offsets)):
        rows = _rows(shard.offsets, group)
        if keep:
            rows = rows[keeps[rows]]
        doc = np.searchsorted(shard.offsets, rows, side="right") - 1
        yield Block(
            doc=doc + shard.first_doc,
            position=rows - shard.offsets[doc],
            token_ids=token_ids[rows],
            keep=keeps[rows],
            codes=_take(packed, rows).unpack(),
        )


def document_block(shard: Shard, doc: int, layer: int, layers: tuple[int, ...]) -> DocumentBlock:
    """One document of a shard; `doc` is its number in the store."""
    start, end = shard.offsets[doc - shard.first_doc : doc - shard.first_doc + 2].tolist()
    rows = shard.some_tokens(start, end)
    codes = {stored: shard.packed(stored).rows(start, end).unpack() for stored in layers}
    keep = ~rows[f"extreme_{layer}"].to_numpy(zero_copy_only=False)
    keep[:1] &= shard.has_last_tokens
    return DocumentBlock(
        doc=np.full(end - start, doc, dtype=np.int64),
        position=np.arange(end - start, dtype=np.int64),
        token_ids=rows["token_id"].to_numpy().astype(np.int64),
        keep=keep,
        codes=codes[layer],
        tokens=rows["token"].to_pylist(),
        spans=spans_of(rows),
        layers=codes,
    )


def _groups(docs: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of documents with at most BLOCK_TOKENS tokens together, or of one longer document."""
    start, tokens = 0, 0
    for i, doc in enumerate(docs):
        if i > start and tokens + lengths[doc] > BLOCK_TOKENS:
            yield docs[start:i]
            start, tokens = i, 0
        tokens += int(lengths[doc])
    yield docs[start:]


def _rows(offsets: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """The rows of some documents, one after the other."""
    lengths = offsets[docs + 1] - offsets[docs]
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(offsets[docs] - (ends - lengths), lengths)


def _take(packed: Packed, rows: np.ndarray) -> Packed:
    """A slice (without a copy) where the rows are consecutive, else a gather."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return packed.rows(int(rows[0]), int(rows[-1]) + 1)
    return packed.take(rows)
