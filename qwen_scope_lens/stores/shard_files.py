"""Shards: a fixed number of consecutive documents, in one folder that is never changed again.

    documents.parquet   doc, key, text, n_tokens, truncated, labels
    tokens.parquet      doc, position, token_id, token, start, end, extreme_<layer>
    offsets.npy         where each document's tokens begin, [n_docs + 1]
    layer<n>/indices.npy, values.npy (and indices_high.npy, overflow.npy)   token-major, `[T, k]`
    layer<n>/features.parquet   layer, feature, doc, position, value, in this order
    layer<n>/firing.npy   the features that fire, and the row where the hits of each begin, `[2, m]`
    shard.json          counts, sizes, checksums

Everything except the arrays is plain Parquet. Shards of older versions have no `firing.npy`.
`shard_reader.py` reads one shard, `store.py` a store of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import (
    file_sha256,
    read_json,
    refuse_link,
    whole_folder,
    write_json,
)
from qwen_scope_lens.stores.codec import REPAIR, Packed
from qwen_scope_lens.stores.manifest import RESERVED, Manifest

__all__ = [
    "FIRING",
    "REPAIR",
    "RESERVED",
    "SHARD_FORMAT",
    "CodedDocument",
    "damage",
    "firing_of",
    "layer_folder",
    "shard_folder",
    "write_shard",
]

NAME = "shard.json"
FIRING = "firing.npy"
SHARD_FORMAT = ("qwen-scope-shard", 1)

_ROW_GROUP = 16384  # one feature is read from one or two of them
_TOKEN_GROUP = 4096
_HITS = pa.schema(
    [
        ("layer", pa.int16()),
        ("feature", pa.int32()),
        ("doc", pa.int32()),
        ("position", pa.int32()),
        ("value", pa.float32()),
    ]
)
_ARROW = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


@dataclass(frozen=True)
class CodedDocument:
    """Everything that a store keeps of one document."""

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
    """Write one shard, whole or not at all. The bytes depend on nothing but the content."""
    corpus = manifest.corpus_of(shard)
    first, end = corpus.span(shard)
    labels = {name: manifest.labels[name] for name in corpus.labels}
    assert len(documents) == end - first
    lengths = np.array([len(document.token_ids) for document in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    doc = np.repeat(np.arange(first, end, dtype=np.int32), lengths)
    position = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)).astype(np.int32)
    nonzero = {}
    refuse_link(store / "shards")
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
        write_json(folder / NAME, *SHARD_FORMAT, content)


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
    pq.write_table(
        pa.table(columns),
        folder / "tokens.parquet",
        compression="zstd",
        row_group_size=_TOKEN_GROUP,
    )


def _write_codes(
    folder: Path, layer: int, codes: Packed, doc: np.ndarray, position: np.ndarray
) -> int:
    """Write both views of one layer. Returns how many entries are active."""
    place = layer_folder(folder, layer)
    place.mkdir()
    np.save(place / "indices.npy", codes.low)
    np.save(place / "values.npy", codes.values)
    if codes.high is not None:
        np.save(place / "indices_high.npy", codes.high)
    if len(codes.overflow):
        np.save(place / "overflow.npy", codes.overflow)
    [active] = np.nonzero(codes.values.reshape(-1) > 0)
    index = (codes.low if codes.high is None else codes.indices()).reshape(-1)
    # Entries of a token have distinct features, so a stable sort leaves (feature, doc, position).
    order = active[np.argsort(index[active], kind="stable")]
    np.save(place / FIRING, firing_of(index[order].astype(np.int32)))
    del active
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": ["layer"],
        "column_encoding": {
            "feature": "DELTA_BINARY_PACKED",
            "doc": "DELTA_BINARY_PACKED",
            "position": "BYTE_STREAM_SPLIT",
            "value": "BYTE_STREAM_SPLIT",
        },
    }
    with pq.ParquetWriter(place / "features.parquet", _HITS, **options) as writer:
        for start in range(0, max(1, len(order)), _ROW_GROUP):
            part = order[start : start + _ROW_GROUP]
            rows, value = part // codes.k, codes.values.reshape(-1)[part].astype(np.float32)
            if len(codes.overflow):
                big = np.isinf(value)
                found = np.searchsorted(codes.overflow["at"], part[big])
                value[big] = codes.overflow["value"][found]
            columns = [
                np.full(len(part), layer, dtype=np.int16),
                index[part].astype(np.int32),
                doc[rows],
                position[rows],
                value,
            ]
            writer.write_table(pa.table([pa.array(column) for column in columns], _HITS))
    return len(order)


def firing_of(feature: np.ndarray) -> np.ndarray:
    """The content of `firing.npy` for the column `feature`, in its order. uint32 `[2, m]`"""
    [starts] = np.nonzero(np.diff(feature, prepend=-1))
    return np.stack([feature[starts], starts]).astype(np.uint32)


def layer_folder(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer}"


def damage(folder: Path, checksums: bool = True) -> str | None:
    """What is wrong with a shard, or None. Without `checksums` only names and sizes count."""
    try:
        facts = read_json(folder / NAME, *SHARD_FORMAT, "qsl extract")
        files = facts["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{path} has {path.stat().st_size} bytes, {expected['size']} were written"
            if checksums and file_sha256(path) != expected["sha256"]:
                return f"{path} has the right size, but not the content that was written"
    except (BadFile, KeyError, TypeError, AttributeError) as error:
        return f"{folder / NAME}: {error}"
    return None
