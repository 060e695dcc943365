"""Several stores merged into one.

There are two cases. The parts of one job (`--worker` on machines that do not share a disk) are
joined by copying their shards. Stores of different corpora are put one after the other, and their
documents get new numbers. Nothing is encoded again. Stores that were made with different models,
SAEs or settings are refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_scope_lens.errors import BadFile, StoreDamaged, StoreMismatch, TooLittleData
from qwen_scope_lens.files import exclusive, is_url, refuse_link, whole_folder
from qwen_scope_lens.stores.inspect import check
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.shard_files import (
    RESERVED,
    CodedDocument,
    damage,
    shard_folder,
    write_shard,
)
from qwen_scope_lens.stores.shard_reader import Shard
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["check", "merge"]


def merge(
    stores: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    shard_docs: int | None = None,
) -> FeatureStore:
    """Merge stores into `out`. Parts of one job are joined; others are put one after the other.

    `shard_docs` is the number of documents per shard (by default what each corpus had); larger
    shards answer questions about one feature faster. The call can be stopped and repeated.
    """
    if any(map(is_url, (*stores, out))):
        raise BadFile("merging works on folders: copy a store from its URL with `qsl store copy`")
    folders = [Path(store).expanduser() for store in stores]
    target = Path(out).expanduser()
    if shard_docs is not None and shard_docs < 1:
        raise TooLittleData(f"shard_docs={shard_docs}: expected 1 or more documents per shard")
    if len(folders) < 2 and shard_docs is None:
        raise TooLittleData(
            "merging takes at least two stores, or one and shard_docs (--shard-docs)"
        )
    # Unlike Path.resolve, realpath accepts links that go round.
    if os.path.realpath(target) in map(os.path.realpath, folders):
        raise StoreMismatch(f"{target} is one of the stores to merge: name another folder")
    manifests = [Manifest.read(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        manifests[0].require_same(manifest, str(folders[0]), str(folder))
    with exclusive(target):
        if len(folders) > 1 and all(_same_job(manifests[0], other) for other in manifests[1:]):
            if shard_docs not in (None, manifests[0].corpora[0].shard_docs):
                raise StoreMismatch("parts of one job are joined as they are: leave shard_docs out")
            _begin(target, manifests[0])
            _join(folders, manifests[0], target)
        else:
            _concatenate(folders, target, shard_docs)
    return FeatureStore.open(target)


def _same_job(one: Manifest, other: Manifest) -> bool:
    return one.corpora == other.corpora and one.labels == other.labels


def _begin(target: Path, manifest: Manifest) -> None:
    if Manifest.exists(target) and Manifest.read(target) != manifest:
        raise StoreMismatch(f"{target} holds another store: choose an empty folder")
    manifest.write(target)


def _join(folders: Sequence[Path], manifest: Manifest, target: Path) -> None:
    for shard in range(manifest.n_shards):
        place = shard_folder(target, shard)
        if place.is_dir() and damage(place) is None:
            continue
        sources = [shard_folder(folder, shard) for folder in folders]
        whole = [source for source in sources if source.is_dir() and damage(source) is None]
        if not whole:
            continue  # `check` names it, and the process that lacks it can still be run
        refuse_link(place.parent)
        with whole_folder(place) as partial:
            shutil.copytree(whole[0], partial, dirs_exist_ok=True)


def _concatenate(folders: Sequence[Path], target: Path, shard_docs: int | None) -> None:
    stores = [FeatureStore.open(folder) for folder in folders]
    for store in stores:
        if problems := check(store.path):
            raise StoreDamaged(f"{problems[0]} ({len(problems)} problems): repair it, then merge")
    merged = replace(stores[0].manifest, corpora=(), labels={})
    for store in stores:
        for corpus in store.manifest.corpora:
            if any(corpus.sha256 == other.sha256 for other in merged.corpora):
                raise StoreMismatch(
                    f"{corpus.name} is in two of the stores: merge each corpus once"
                )
            size = shard_docs or corpus.shard_docs
            labels = {name: store.manifest.labels[name] for name in corpus.labels}
            merged = merged.with_corpus(replace(corpus, shard_docs=size), labels)
    _begin(target, merged)
    documents = (document for store in stores for document in _documents(store))
    for shard in range(merged.n_shards):
        start, end = merged.corpus_of(shard).span(shard)
        coded = [next(documents) for _ in range(end - start)]
        place = shard_folder(target, shard)
        if not place.is_dir() or damage(place) is not None:
            write_shard(target, shard, merged, coded)


def _documents(store: FeatureStore) -> Iterator[CodedDocument]:
    """Everything that a store keeps of each document, in order."""
    for shard in store.shards:
        yield from _documents_of(shard, store)
        shard.forget_tokens()


def _documents_of(shard: Shard, store: FeatureStore) -> Iterator[CodedDocument]:
    rows = shard.table("documents.parquet").to_pylist()
    tokens = shard.table("tokens.parquet", ["token"])["token"].to_pylist()
    ids, spans = shard.token_ids(), shard.spans()
    extreme = {
        layer: shard.tokens[f"extreme_{layer}"].to_numpy(zero_copy_only=False)
        for layer in store.layers
    }
    packed = {layer: shard.packed(layer) for layer in store.layers}
    for i, row in enumerate(rows):
        start, end = shard.offsets[i : i + 2].tolist()
        own = spans[start:end]
        yield CodedDocument(
            key=row["key"],
            text=row["text"],
            labels={name: value for name, value in row.items() if name not in RESERVED},
            token_ids=ids[start:end],
            tokens=tokens[start:end],
            spans=None if len(own) and np.all(own < 0) else own,
            truncated=row["truncated"],
            codes={layer: codes.rows(start, end) for layer, codes in packed.items()},
            extreme={layer: flags[start:end] for layer, flags in extreme.items()},
        )
