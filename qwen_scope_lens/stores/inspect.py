"""`qsl store check`: everything that is wrong with a store, by its checksums and by its content.

Checksums find what changed after it was written. A store may also come from somebody who computed
the checksums again after a change, so the content is checked, too: numbers must be within their
bounds, and the two views of the codes, the documents and the tokens must agree.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from qwen_scope_lens.errors import BadFile, StoreDamaged
from qwen_scope_lens.files import is_url
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.shard_files import FIRING, damage, firing_of, shard_folder
from qwen_scope_lens.stores.shard_reader import Shard

__all__ = ["check"]

MOST_MISSING = 1000
"""How many missing shards after the last one are named one by one."""


def check(path: str | os.PathLike[str], checksums: bool = True) -> list[str]:
    """Everything that is wrong with a store, one line each; empty when it is whole.

    Without `checksums` only names and sizes are compared, and the files are not read.
    """
    if is_url(path):
        if checksums:
            raise BadFile(
                f"checking all of {path} would copy it here: check names and sizes only"
                " (--sizes-only), or copy it with `qsl store copy` and check the copy. What is read"
                " from a URL is always compared with its checksum"
            )
        return _missing_at(str(path))
    folder = Path(path).expanduser()
    manifest = Manifest.read(folder)
    problems = []
    numbers = [int(p.name) for p in folder.glob("shards/[0-9]*") if p.name.isdecimal()]
    end = min(manifest.n_shards, max(numbers, default=-1) + 1 + MOST_MISSING)
    for shard in range(end):
        place = shard_folder(folder, shard)
        if not place.is_dir():
            problems.append(f"{place} is missing: `qsl extract` was stopped, or runs")
            continue
        problem = damage(place, checksums)
        if problem is None and checksums:
            problem = _contradiction(folder, shard, manifest)
        problems += [] if problem is None else [problem]
    if end < manifest.n_shards:
        problems.append(f"{manifest.n_shards - end:,} more shards are missing")
    return problems


def _missing_at(url: str) -> list[str]:
    """The shards of a store at a URL that are not there in full."""
    from qwen_scope_lens.stores.remote import Remote, open_manifest

    numbers = range(open_manifest(url).n_shards)
    whole = Remote.of(url).whole(numbers)
    wrong = [n for n in numbers if n not in whole]
    problems = [
        f"{url}/shards/{n:05d} is missing or not whole: the same command sends it again"
        for n in wrong[:MOST_MISSING]
    ]
    more = len(wrong) - len(problems)
    return problems + ([f"{more:,} more shards are missing"] if more else [])


def _contradiction(folder: Path, number: int, manifest: Manifest) -> str | None:
    """What contradicts itself in a shard, whatever the checksums say, or None."""
    try:
        shard = Shard(folder, number, manifest)
        lengths = np.diff(shard.offsets)
        documents = shard.table("documents.parquet", ["doc", "n_tokens"])
        first = np.arange(shard.first_doc, shard.first_doc + shard.n_docs)
        if not np.array_equal(documents["doc"], first):
            return f"{shard.path('documents.parquet')} has other documents than its folder"
        if not np.array_equal(documents["n_tokens"], lengths):
            return f"{shard.path('documents.parquet')} has other lengths than offsets.npy"
        doc = np.repeat(first, lengths)
        position = np.arange(len(doc)) - np.repeat(shard.offsets[:-1], lengths)
        tokens = shard.table("tokens.parquet", ["doc", "position"])
        if not _same(tokens["doc"], doc) or not _same(tokens["position"], position):
            return f"{shard.path('tokens.parquet')} has other tokens than offsets.npy"
        for layer in manifest.layers:
            if problem := _views_differ(shard, layer, doc, position):
                return problem
    except StoreDamaged as error:
        return str(error)
    return None


def _views_differ(shard: Shard, layer: int, doc: np.ndarray, position: np.ndarray) -> str | None:
    """How a layer's codes by token differ from its `features.parquet`, or None."""
    path = shard.features_path(layer)
    packed = shard.packed(layer)
    index, values = packed.indices().reshape(-1), packed.numbers().reshape(-1)
    [active] = np.nonzero(values > 0)
    order = active[np.argsort(index[active], kind="stable")]
    feature, rows = index[order], order // packed.k
    if ((np.diff(feature) == 0) & (np.diff(rows) == 0)).any():
        return f"{path.parent}: a feature fires twice on one token"
    if shard.n_nonzero[layer] != len(order):
        return f"{path.parent} has {len(order):,} entries, {shard.n_nonzero[layer]:,} were written"
    columns = {
        "feature": feature,
        "doc": doc[rows],
        "position": position[rows],
        "value": values[order],
        "layer": np.full(len(order), layer),
    }
    table = shard.table(path.relative_to(shard.folder).as_posix(), list(columns))
    for name, expected in columns.items():
        if not _same(table[name], expected):
            return f"{path}: {name} differs from the codes by token"
    found = shard.firing(layer)
    if found is not None and not np.array_equal(np.stack(found), firing_of(feature)):
        return f"{path.with_name(FIRING)} differs from the codes by token"
    return None


def _same(column: object, expected: np.ndarray) -> bool:
    return np.array_equal(np.asarray(column), expected)
