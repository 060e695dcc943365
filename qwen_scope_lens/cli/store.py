"""Look into a feature store: what is in it, whether it is whole, questions in SQL; merge, copy.

    qsl store info store/
    qsl store check store/
    qsl store sql store/ "select feature, count(*) n from features group by 1 order by n desc"
    qsl store merge all/ store/ new/            # makes all/
    qsl store cost --tokens 1e9 --layers 36     # on paper
    # needs a bucket:
    qsl store copy store/ s3://bucket/store

The views for SQL: features (layer, feature, doc, position, value), documents (doc, key, text,
n_tokens, truncated, labels), tokens (doc, position, token_id, token, start, end, extreme_<layer>).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_store,
    add_words,
    count,
    memory,
    place,
    positive,
    print_json,
    remark,
)
from qwen_scope_lens.cli.terminal import plain

if TYPE_CHECKING:
    import pyarrow as pa

    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["add_arguments", "describe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)


def _info(arguments: argparse.Namespace) -> None:
    """What is in the store, and how it was made."""
    from qwen_scope_lens.stores.store import FeatureStore

    store = FeatureStore.open(arguments.store)
    if arguments.json:
        print_json(arguments.json, facts(store))
    else:
        print(plain(describe(store)))


def facts(store: FeatureStore) -> dict[str, Any]:
    """What `describe` says, as plain values, with the whole manifest."""
    size = sum(f["size"] for shard in store.shards for f in shard.files.values())
    return {
        "path": str(store.place),
        "documents": store.n_docs,
        "tokens": store.n_tokens,
        "shards": len(store.shards),
        "complete": store.is_complete,
        "bytes": size,
        "nonzero": {layer: store.n_nonzero(layer) for layer in store.layers},
        "manifest": asdict(store.manifest),
    }


def describe(store: FeatureStore) -> str:
    """A store in a few lines."""
    manifest, settings = store.manifest, store.manifest.settings
    size = sum(f["size"] for shard in store.shards for f in shard.files.values())
    state = "" if store.is_complete else f" of {manifest.n_docs:,}: not complete"
    lines = [
        f"{store.place}: {store.n_docs:,} documents{state}, {store.n_tokens:,} tokens,"
        f" {len(store.shards)} shards, {size / 1e6:,.1f} MB",
        f"  model      {manifest.model.id} ({manifest.model.dtype})",
    ]
    for layer in store.layers:
        facts = store.sae(layer)
        lines.append(f"  layer {layer:<4} {facts.ref}: {store.n_nonzero(layer):,} non-zeros")
    cut = "the model's context" if settings.max_tokens is None else f"{settings.max_tokens}"
    lines.append(f"  tokens     at most {cut} per document")
    if settings.enable_thinking is not None:
        lines.append(f"  chats      enable_thinking={settings.enable_thinking}")
    named = ", ".join(f"{name} ({kind})" for name, kind in manifest.labels.items())
    lines.append(f"  labels     {named or 'none'}")
    lines += [f"  corpus     {c.name}: {c.n_docs:,} documents" for c in manifest.corpora]
    return "\n".join(lines)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--sizes-only", action="store_true", help="do not read the files")
    add_json(parser)


def _check(arguments: argparse.Namespace) -> int:
    """Read every file and compare it with its checksum. Exits with 1 if one differs."""
    from qwen_scope_lens.stores.merge import check

    problems = check(arguments.store, checksums=not arguments.sizes_only)
    if arguments.json:
        print_json(arguments.json, {"store": str(arguments.store), "problems": problems})
        return 1 if problems else 0
    for problem in problems:
        print(plain(f"PROBLEM  {problem}"))
    if not problems:
        print(f"{arguments.store}: whole")
    return 1 if problems else 0


def _sql_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("query", help="one SELECT over the views features, documents, tokens")
    parser.add_argument("--json", action="store_true", help="print JSON Lines instead")
    parser.add_argument(
        "--memory",
        type=memory,
        metavar="SIZE",
        help="the most memory that DuckDB may use, such as 8GB; default: 2 GiB",
    )


def _sql(arguments: argparse.Namespace) -> None:
    """Run one SELECT and print the answer as tab-separated lines."""
    import json

    from qwen_scope_lens.stores.store import FeatureStore

    answer = FeatureStore.open(arguments.store).sql(arguments.query, arguments.memory)
    rows = _rows(answer)
    if arguments.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
        return
    print("\t".join(map(_cell, answer.column_names)))
    for row in rows:
        print("\t".join(_cell(value) for value in row.values()))


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


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder of the new store")
    parser.add_argument("stores", type=place, nargs="+", action=Input, check=inputs.store)
    parser.add_argument("--shard-docs", type=count, help="documents per shard in the new store")


def _merge(arguments: argparse.Namespace) -> None:
    """Make one store of several."""
    from qwen_scope_lens.stores.merge import merge

    store = merge(arguments.stores, arguments.out, arguments.shard_docs)
    print(plain(describe(store)))
    if not store.is_complete:
        remark("the store is not complete: run the missing parts, then merge again")


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=place, action=Input, check=inputs.store, help="a store's folder or URL"
    )
    parser.add_argument(
        "target",
        type=place,
        action=Input,
        check=inputs.lasting,
        help="a URL, or an empty folder",
    )


def _copy(arguments: argparse.Namespace) -> None:
    """Copy a store to a URL (s3://bucket/store), or from one; goes on where it was stopped."""
    from qwen_scope_lens.stores.remote import copy
    from qwen_scope_lens.stores.store import FeatureStore

    copy(arguments.source, arguments.target, progress=not arguments.quiet)
    print(plain(describe(FeatureStore.open(arguments.target))))


def _cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sae", metavar="GROUP", action=Input, check=inputs.group, help="default: all of Qwen's"
    )
    parser.add_argument("--tokens", type=positive, default=1e9, help="default: 1e9")
    parser.add_argument(
        "--layers", type=count, metavar="N", help="the first N of a model; default: all"
    )
    parser.add_argument("--tokens-per-document", type=positive, default=250.0, help="default: 250")
    parser.add_argument("--shard-docs", type=count, default=4096, help="default: 4096")
    parser.add_argument(
        "--peak", type=positive, default=989.0, help="Tflop/s in bfloat16; default: 989 (an H100)"
    )
    parser.add_argument("--utilisation", type=positive, default=0.4, help="default: 0.4")
    add_json(parser)


def _cost(arguments: argparse.Namespace) -> None:
    """What an extraction costs on paper: GPU hours, CPU hours, bytes and files."""
    from qwen_scope_lens.stores.cost import Job, cost_table

    job = Job(
        tokens=arguments.tokens,
        layers=arguments.layers,
        tokens_per_document=arguments.tokens_per_document,
        shard_docs=arguments.shard_docs,
        peak=arguments.peak * 1e12,
        utilisation=arguments.utilisation,
    )
    table = cost_table(job, [find_group(arguments.sae)] if arguments.sae else None)
    if arguments.json:
        print_json(arguments.json, {"costs": table.records()})
    else:
        print(table)


WORDS = (
    Word("info", _info_arguments, _info),
    Word("check", _check_arguments, _check),
    Word("sql", _sql_arguments, _sql),
    Word("merge", _merge_arguments, _merge),
    Word("copy", _copy_arguments, _copy),
    Word("cost", _cost_arguments, _cost),
)
