"""One finished shard, read: its tokens, the codes of its rows, the hits of a feature.

`blocks.py` makes of these what the methods of `store.py` return, and `shard_files.py` writes the
files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope_lens.errors import BadFile, StorageUnreachable, StoreDamaged
from qwen_scope_lens.files import open_regular, read_json
from qwen_scope_lens.stores.codec import OVERFLOW, Packed
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.shard_files import (
    FIRING,
    REPAIR,
    SHARD_FORMAT,
    layer_folder,
    shard_folder,
)

if TYPE_CHECKING:
    from qwen_scope_lens.stores.remote import RemoteShard

__all__ = [
    "Shard",
    "spans_of",
]


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
        self._firing: dict[int, np.ndarray] = {}
        self._footers: dict[int, pq.FileMetaData] = {}
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}

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
        self._firing.clear()

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
        """doc, position, value of one feature, from the few row groups that have it."""
        found = self._rows_of(layer, feature)
        if found is not None and found[0] == found[1]:
            none = np.zeros(0, np.int64)
            return none, none, np.zeros(0, np.float32)
        if layer not in self._footers:
            self._footers[layer] = self._footer(_features(layer))
        meta = self._footers[layer]
        if found is None:
            groups = self._groups_with(layer, feature, meta)
            if not groups:
                none = np.zeros(0, np.int64)
                return none, none, np.zeros(0, np.float32)
        else:
            size = meta.row_group(0).num_rows
            groups = list(range(found[0] // size, (found[1] - 1) // size + 1))
        try:
            with self._ranges(_features(layer)) as file:
                table = pq.ParquetFile(file, metadata=meta).read_row_groups(
                    groups, columns=["feature", "doc", "position", "value"], use_threads=False
                )
        except StorageUnreachable:
            raise
        except (OSError, IndexError, pa.ArrowException) as error:
            place = self._place(_features(layer))
            raise StoreDamaged(f"{place} cannot be read: {error}. {REPAIR}") from error
        here = table["feature"].to_numpy()
        rows = slice(*np.searchsorted(here, [feature, feature + 1]).tolist())
        if found is not None and rows.stop - rows.start != found[1] - found[0]:
            raise StoreDamaged(
                f"{self._place(_firing(layer))} says that feature {feature} has"
                f" {found[1] - found[0]} hits, {rows.stop - rows.start} are there. {REPAIR}"
            )
        doc, position, value = (
            table[name].to_numpy()[rows] for name in ("doc", "position", "value")
        )
        return doc.astype(np.int64), position.astype(np.int64), value

    def firing(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The features that fire, ascending, and where the hits of each begin in
        `features.parquet`; None in a shard of an older version. Both are `[m]`."""
        if _firing(layer) not in self.files:
            return None
        if layer not in self._firing:
            found = self._array(_firing(layer))
            if found.dtype != np.uint32 or found.ndim != 2 or len(found) != 2:
                raise StoreDamaged(
                    f"{self._place(_firing(layer))} has another shape than was written. {REPAIR}"
                )
            self._firing[layer] = found
        feature, start = self._firing[layer]
        return feature, start

    def _rows_of(self, layer: int, feature: int) -> tuple[int, int] | None:
        """The rows of `features.parquet` that a feature has; None where only the file can say."""
        if (found := self.firing(layer)) is None:
            return None
        features, starts = found
        at = int(np.searchsorted(features, feature))
        if at == len(features) or features[at] != feature:
            return 0, 0
        end = starts[at + 1] if at + 1 < len(starts) else self.n_nonzero[layer]
        return int(starts[at]), max(int(starts[at]), int(end))

    def _groups_with(self, layer: int, feature: int, meta: pq.FileMetaData) -> list[int]:
        """The row groups whose least and greatest feature let them have a feature."""
        if layer not in self._ends:
            at = meta.schema.names.index("feature")
            ranges = [meta.row_group(i).column(at).statistics for i in range(meta.num_row_groups)]
            low = np.array([r.min for r in ranges if r is not None], dtype=np.int64)
            high = np.array([r.max for r in ranges if r is not None], dtype=np.int64)
            self._ends[layer] = low, high
        low, high = self._ends[layer]
        groups: list[int] = np.nonzero((low <= feature) & (feature <= high))[0].tolist()
        return groups

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


def _firing(layer: int) -> str:
    return (layer_folder(Path(), layer) / FIRING).as_posix()


def spans_of(tokens: pa.Table) -> np.ndarray:
    """int64 `[n, 2]` of rows of `tokens.parquet`; -1 where there is no text."""
    columns = [tokens[name].fill_null(-1).to_numpy() for name in ("start", "end")]
    return np.stack(columns, axis=1).astype(np.int64)
