"""Shards: a fixed number of consecutive documents in one folder that is never changed.

    documents.parquet   doc, key, text, n_tokens, truncated, labels
    tokens.parquet      doc, position, token_id, token, start, end, extreme_<layer>
    offsets.npy         where each document's tokens begin, [n_docs + 1]
    layer<n>/indices.npy, values.npy (and indices_high.npy, overflow.npy)   token-major, `[T, k]`
    layer<n>/features.parquet   layer, feature, doc, position, value, in this order
    shard.json          counts, sizes, checksums

Everything but `offsets.npy` and the token-major arrays is plain Parquet. What a store of many
shards answers is `store.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope_lens.errors import BadFile, StoreDamaged
from qwen_scope_lens.features.manifest import Manifest
from qwen_scope_lens.features.packed import OVERFLOW, Packed
from qwen_scope_lens.files import file_sha256, read_json, whole_folder, write_json

__all__ = ["RESERVED", "CodedDocument", "Shard", "damage", "shard_folder", "write_shard"]

FORMAT, VERSION, NAME = "qwen-scope-shard", 1, "shard.json"
RESERVED = ("doc", "key", "text", "n_tokens", "truncated")
"""Columns of `documents` that are no labels."""

_ROW_GROUP = 16384
_ARROW = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


@dataclass(frozen=True)
class CodedDocument:
    """All that a store keeps of one document."""

    key: str
    text: str | None
    labels: dict[str, Any]
    token_ids: np.ndarray  # [n]
    tokens: list[str]
    spans: np.ndarray | None  # [n, 2]
    truncated: bool
    codes: dict[int, Packed]  # layer -> [n, k]
    extreme: dict[int, np.ndarray]  # layer -> bool [n]


def shard_folder(store: Path, shard: int) -> Path:
    return store / "shards" / f"{shard:05d}"


def write_shard(
    store: Path, shard: int, manifest: Manifest, documents: Sequence[CodedDocument]
) -> None:
    """Write one shard, whole or not at all. The bytes follow from the content alone."""
    corpus = manifest.corpus_of(shard)
    first, end = corpus.span(shard)
    labels = {name: manifest.labels[name] for name in corpus.labels}
    assert len(documents) == end - first
    lengths = np.array([len(document.token_ids) for document in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    doc = np.repeat(np.arange(first, end, dtype=np.int32), lengths)
    position = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)).astype(np.int32)
    nonzero = {}
    with whole_folder(shard_folder(store, shard)) as folder:
        _write_documents(folder, first, documents, labels)
        _write_tokens(folder, doc, position, documents, manifest.layers)
        np.save(folder / "offsets.npy", offsets)
        for layer in manifest.layers:
            codes = Packed.cat([document.codes[layer] for document in documents])
            nonzero[str(layer)] = _write_codes(folder, layer, codes, doc, position)
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        content = {
            "shard": shard,
            "first_doc": first,
            "n_docs": end - first,
            "n_tokens": int(offsets[-1]),
            "n_nonzero": nonzero,
            "files": {
                name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
                for name in names
            },
        }
        write_json(folder / NAME, FORMAT, VERSION, content)


def _write_documents(
    folder: Path, first: int, documents: Sequence[CodedDocument], labels: dict[str, str]
) -> None:
    columns: dict[str, Any] = {
        "doc": pa.array(np.arange(first, first + len(documents), dtype=np.int64)),
        "key": pa.array([document.key for document in documents], pa.string()),
        "text": pa.array([document.text for document in documents], pa.string()),
        "n_tokens": pa.array([len(document.token_ids) for document in documents], pa.int32()),
        "truncated": pa.array([document.truncated for document in documents], pa.bool_()),
    }
    for name, kind in labels.items():
        values = [_as(kind, document.labels.get(name)) for document in documents]
        columns[name] = pa.array(values, _ARROW[kind])
    pq.write_table(pa.table(columns), folder / "documents.parquet", compression="zstd")


def _as(kind: str, value: Any) -> Any:
    if value is None or kind == "bool":
        return value
    return {"int": int, "float": float, "str": str}[kind](value)


def _write_tokens(
    folder: Path,
    doc: np.ndarray,
    position: np.ndarray,
    documents: Sequence[CodedDocument],
    layers: Sequence[int],
) -> None:
    def column(values: Any, kind: Any) -> pa.Array:
        return pa.array(np.concatenate(values).astype(kind))

    starts = []
    for document in documents:
        spans = document.spans
        starts.append(np.full((len(document.token_ids), 2), -1) if spans is None else spans)
    spans = np.concatenate(starts).astype(np.int32)
    tokens = [token for document in documents for token in document.tokens]
    columns = {
        "doc": pa.array(doc),
        "position": pa.array(position),
        "token_id": column([document.token_ids for document in documents], np.int32),
        "token": pa.array(tokens, pa.string()),
        "start": pa.array(spans[:, 0], mask=spans[:, 0] < 0),
        "end": pa.array(spans[:, 1], mask=spans[:, 1] < 0),
    }
    for layer in layers:
        columns[f"extreme_{layer}"] = column([d.extreme[layer] for d in documents], bool)
    pq.write_table(pa.table(columns), folder / "tokens.parquet", compression="zstd")


def _write_codes(
    folder: Path, layer: int, codes: Packed, doc: np.ndarray, position: np.ndarray
) -> int:
    """Both views of one layer. Returns how many entries are active."""
    place = _layer_folder(folder, layer)
    place.mkdir()
    np.save(place / "indices.npy", codes.low)
    np.save(place / "values.npy", codes.values)
    if codes.high is not None:
        np.save(place / "indices_high.npy", codes.high)
    if len(codes.overflow):
        np.save(place / "overflow.npy", codes.overflow)
    [active] = np.nonzero(codes.values.reshape(-1) > 0)
    index = codes.low if codes.high is None else codes.indices()
    # Entries of a token have distinct features, so a stable sort leaves (feature, doc, position).
    order = active[np.argsort(index.reshape(-1)[active], kind="stable")]
    rows = order // codes.k
    feature = index.reshape(-1)[order].astype(np.int32)
    value = codes.values.reshape(-1)[order].astype(np.float32)
    if len(codes.overflow):
        big = np.isinf(value)
        found = np.searchsorted(codes.overflow["at"], order[big])
        value[big] = codes.overflow["value"][found]
    table = pa.table(
        {
            "layer": pa.array(np.full(len(order), layer, dtype=np.int16)),
            "feature": pa.array(feature),
            "doc": pa.array(doc[rows]),
            "position": pa.array(position[rows]),
            "value": pa.array(value),
        }
    )
    pq.write_table(
        table,
        place / "features.parquet",
        compression="zstd",
        row_group_size=_ROW_GROUP,
        use_dictionary=["layer"],
        column_encoding={
            "feature": "DELTA_BINARY_PACKED",
            "doc": "DELTA_BINARY_PACKED",
            "position": "BYTE_STREAM_SPLIT",
            "value": "BYTE_STREAM_SPLIT",
        },
    )
    return len(order)


def _layer_folder(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer}"


def damage(folder: Path, checksums: bool = True) -> str | None:
    """What is wrong with a shard, or None. Without checksums only names and sizes are compared."""
    try:
        facts = read_json(folder / NAME, FORMAT, VERSION, "qsl extract")
        files = facts["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{path} has {path.stat().st_size} bytes, {expected['size']} were written"
            if checksums and file_sha256(path) != expected["sha256"]:
                return f"{path} has the right size, but another content than was written"
    except (BadFile, KeyError, TypeError, AttributeError) as error:
        return f"{folder / NAME}: {error}"
    return None


class Shard:
    """One finished shard, memory-mapped; nothing is read before it is asked for."""

    def __init__(self, store: Path, number: int, manifest: Manifest) -> None:
        self.folder, self.number, self._manifest = shard_folder(store, number), number, manifest
        try:
            facts = read_json(self.folder / NAME, FORMAT, VERSION, "qsl extract")
            self.first_doc, self.n_docs = int(facts["first_doc"]), int(facts["n_docs"])
            self.n_tokens = int(facts["n_tokens"])
            self.n_nonzero = {int(layer): int(n) for layer, n in facts["n_nonzero"].items()}
            self.files: dict[str, dict[str, Any]] = facts["files"]
        except (BadFile, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreDamaged(f"{self.folder}: {error}. {REPAIR}") from error
        if (self.first_doc, self.first_doc + self.n_docs) != manifest.corpus_of(number).span(
            number
        ):
            raise StoreDamaged(f"{self.folder} holds other documents than the manifest says")
        self._packed: dict[int, Packed] = {}
        self._groups: dict[int, tuple[pq.FileMetaData, np.ndarray, np.ndarray]] = {}

    def path(self, name: str) -> Path:
        return self.folder / name

    def features_path(self, layer: int) -> Path:
        return _layer_folder(self.folder, layer) / "features.parquet"

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._array("offsets.npy", mapped=False)

    def packed(self, layer: int) -> Packed:
        """The layer's codes of all tokens, as views of the files."""
        if layer not in self._packed:
            name = _layer_folder(Path(), layer)
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
            if not packed.low.shape == packed.values.shape == (self.n_tokens, packed.k):
                raise StoreDamaged(f"{self.folder}/{name}: arrays do not fit together. {REPAIR}")
            self._packed[layer] = packed
        return self._packed[layer]

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
        columns = [self.tokens[name].fill_null(-1).to_numpy() for name in ("start", "end")]
        return np.stack(columns, axis=1).astype(np.int64)

    def keep(self, layer: int) -> np.ndarray:
        """bool `[T]`: neither the first token of its document nor of extreme norm."""
        keep = ~self.tokens[f"extreme_{layer}"].to_numpy(zero_copy_only=False)
        starts = self.offsets[:-1]
        keep[starts[starts < self.n_tokens]] = False
        return keep

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(self.path(name), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise StoreDamaged(f"{self.path(name)} cannot be read: {error}. {REPAIR}") from error

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
            with pq.ParquetFile(self.features_path(layer), metadata=meta) as file:
                table = file.read_row_groups(
                    groups, columns=["feature", "doc", "position", "value"], use_threads=False
                )
        except (OSError, pa.ArrowException) as error:
            path = self.features_path(layer)
            raise StoreDamaged(f"{path} cannot be read: {error}. {REPAIR}") from error
        found = table["feature"].to_numpy()
        rows = slice(*np.searchsorted(found, [feature, feature + 1]).tolist())
        doc, position, value = (
            table[name].to_numpy()[rows] for name in ("doc", "position", "value")
        )
        return doc.astype(np.int64), position.astype(np.int64), value

    def _open_groups(self, layer: int) -> tuple[pq.FileMetaData, np.ndarray, np.ndarray]:
        """The footer, and the least and the greatest feature of every row group."""
        path = self.features_path(layer)
        try:
            meta = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise StoreDamaged(f"{path} cannot be read: {error}. {REPAIR}") from error
        at = meta.schema.names.index("feature")
        ranges = [meta.row_group(i).column(at).statistics for i in range(meta.num_row_groups)]
        low = np.array([r.min for r in ranges if r is not None], dtype=np.int64)
        return meta, low, np.array([r.max for r in ranges if r is not None], dtype=np.int64)

    def _array(self, name: str, mapped: bool = True) -> np.ndarray:
        try:
            return np.load(self.path(name), mmap_mode="r" if mapped else None)
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"{self.path(name)} cannot be read: {error}. {REPAIR}") from error


REPAIR = (
    "`qsl store check` finds all damage; the same `qsl extract` again makes damaged shards anew"
)
