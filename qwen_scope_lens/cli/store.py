"""What is in a feature store, whether it is whole, questions in SQL, and merging.

    qsl store info store/
    qsl store check store/
    qsl store sql store/ "select feature, count(*) n from features group by 1 order by n desc"
    qsl store merge store/ part-0/ part-1/      # store/ is made

The views for SQL: features (layer, feature, doc, position, value), documents (doc, key, text,
n_tokens, truncated, labels), tokens (doc, position, token_id, token, start, end, extreme_<layer>).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli.arguments import count, memory
from qwen_scope_lens.cli.terminal import plain

if TYPE_CHECKING:
    import pyarrow as pa

    from qwen_scope_lens.features.store import FeatureStore

__all__ = ["add_arguments", "describe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="info|check|sql|merge")
    info = verbs.add_parser("info", help="what is in it, and how it was made")
    info.add_argument("store", type=Path)
    check = verbs.add_parser("check", help="read everything and compare it with its checksums")
    check.add_argument("store", type=Path)
    check.add_argument("--sizes-only", action="store_true", help="without reading the files")
    sql = verbs.add_parser("sql", help="one SELECT; the answer as tab-separated lines")
    sql.add_argument("store", type=Path)
    sql.add_argument("query", help="over the views features, documents, tokens")
    sql.add_argument("--json", action="store_true", help="as JSON Lines instead")
    sql.add_argument("--memory", type=memory, metavar="SIZE", help="for DuckDB; default: 2 GiB")
    merge = verbs.add_parser("merge", help="one store of several")
    merge.add_argument("out", type=Path, help="the folder of the new store")
    merge.add_argument("stores", type=Path, nargs="+")
    merge.add_argument("--shard-docs", type=count, help="documents of a shard in the new store")


def run(arguments: argparse.Namespace) -> int:
    return _VERBS[arguments.verb](arguments)


def _info(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.store import FeatureStore

    print(plain(describe(FeatureStore.open(arguments.store))))
    return 0


def describe(store: FeatureStore) -> str:
    """A store in a few lines."""
    manifest, settings = store.manifest, store.manifest.settings
    size = sum(f["size"] for shard in store.shards for f in shard.files.values())
    state = "" if store.is_complete else f" of {manifest.n_docs:,}: not complete"
    lines = [
        f"{store.path}: {store.n_docs:,} documents{state}, {store.n_tokens:,} tokens,"
        f" {len(store.shards)} shards, {size / 1e6:,.1f} MB",
        f"  model      {manifest.model.id} ({manifest.model.dtype})",
    ]
    for layer in store.layers:
        facts = store.sae(layer)
        lines.append(f"  layer {layer:<4} {facts.ref}: {store.n_nonzero(layer):,} non-zeros")
    cut = "the model's context" if settings.max_tokens is None else f"{settings.max_tokens}"
    lines.append(f"  tokens     at most {cut} a document")
    if settings.enable_thinking is not None:
        lines.append(f"  chats      enable_thinking={settings.enable_thinking}")
    named = ", ".join(f"{name} ({kind})" for name, kind in manifest.labels.items())
    lines.append(f"  labels     {named or 'none'}")
    lines += [f"  corpus     {c.name}: {c.n_docs:,} documents" for c in manifest.corpora]
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.merge import check

    problems = check(arguments.store, checksums=not arguments.sizes_only)
    for problem in problems:
        print(plain(f"PROBLEM  {problem}"))
    if not problems:
        print(f"{arguments.store}: whole")
    return 1 if problems else 0


def _sql(arguments: argparse.Namespace) -> int:
    import json

    from qwen_scope_lens.features.store import FeatureStore

    answer = FeatureStore.open(arguments.store).sql(arguments.query, arguments.memory)
    rows = _rows(answer)
    if arguments.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
        return 0
    print("\t".join(map(_cell, answer.column_names)))
    for row in rows:
        print("\t".join(_cell(value) for value in row.values()))
    return 0


def _rows(answer: pa.Table) -> list[dict[str, Any]]:
    from qwen_scope_lens.errors import BadQuery

    try:
        rows: list[dict[str, Any]] = answer.to_pylist()
    except (OverflowError, ValueError) as error:
        raise BadQuery(
            f"a value of the answer cannot be shown ({error}): dates end with the year 9999 here."
            " Write it as text in the query, such as column::varchar"
        ) from error
    return rows


def _cell(value: object) -> str:
    if value is None:
        return ""
    return plain(str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n"))


def _merge(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.merge import merge

    store = merge(arguments.stores, arguments.out, arguments.shard_docs)
    print(plain(describe(store)))
    if not store.is_complete:
        print("not complete: run the missing ranks, then merge again", file=sys.stderr)
    return 0


_VERBS = {"info": _info, "check": _check, "sql": _sql, "merge": _merge}
