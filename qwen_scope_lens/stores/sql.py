"""SQL over a store: DuckDB reads its Parquet files and can change nothing.

The views: `features` (layer, feature, doc, position, value), `documents` (doc, key, text, n_tokens,
truncated, labels) and `tokens` (doc, position, token_id, token, start, end, extreme_<layer>).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qwen_scope_lens.errors import BadQuery, StoreDamaged
from qwen_scope_lens.stores.codec import REPAIR
from qwen_scope_lens.stores.shard_files import RESERVED, layer_folder

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["run_query"]

VIEWS = "features, documents and tokens"
MOST_MEMORY = 2 * 2**30
"""The most bytes that DuckDB uses by default; its own default is most of the machine's memory."""

MOST_NESTED = 200
"""The most brackets inside each other. DuckDB's parser takes minutes for some thousands."""


def run_query(
    store: FeatureStore,
    query: str,
    most_memory: int = MOST_MEMORY,
    most_seconds: float | None = None,
) -> pa.Table:
    """The answer to one SELECT. DuckDB uses at most `most_memory` bytes and `most_seconds` for
    it."""
    import duckdb

    if not store.shards:
        raise StoreDamaged(f"{store.place} has no finished document yet: let `qsl extract` run")
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise BadQuery("the query has half of a surrogate pair in it: expected whole characters")
    if most_memory < 2**20:
        raise BadQuery(f"most_memory={most_memory}: expected a MiB (2^20 bytes) or more")
    if (deep := _nested(query)) > MOST_NESTED:
        raise BadQuery(f"the query nests {deep} brackets: expected {MOST_NESTED} or fewer")
    hint = f"(the views are {VIEWS})"
    if mixed := _mixed_labels(store):
        hint = (
            f"(there is no view `documents`: {mixed[0]!r} and {mixed[1]!r} differ only in case,"
            " which SQL does not tell apart. Extract again with one of them renamed, or use"
            " FeatureStore.labels)"
        )
    with duckdb.connect() as connection:
        connection.execute(f"set memory_limit = '{most_memory // 2**20} MiB'")
        _register(connection, store, query, documents=not mixed)
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1:
                raise BadQuery(f"expected one SELECT, found {len(statements)} statements")
            kind = statements[0].type
            if kind != duckdb.StatementType.SELECT:
                raise BadQuery(
                    f"SQL can only read a store: expected a SELECT over {VIEWS}, found"
                    f" {str(kind).rpartition('.')[2]}"
                )
            with _ended_after(connection, most_seconds):
                return connection.sql(query).to_arrow_table()
        except duckdb.OutOfMemoryException as error:
            raise BadQuery(
                f"DuckDB needs more than {most_memory / 2**30:.3g} GiB for this query: ask for less"
                " (fewer columns, a where or a limit), or give it more with most_memory=..."
                " (--memory 8GB)"
            ) from error
        except duckdb.Error as error:
            words = " ".join(str(error).split())
            if address := re.search(r"[\w.-]+/[\w.-]+/(\d+)/(\d+)", query):
                hint += (
                    f". Layers and features are numbers here: {address[0]} is layer = {address[1]}"
                    f" and feature = {address[2]}"
                )
            raise BadQuery(f"DuckDB: {words} {hint}") from error


@contextmanager
def _ended_after(connection: Any, seconds: float | None) -> Iterator[None]:
    """Interrupt what the connection does after so many seconds, and raise `BadQuery`."""
    import duckdb

    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException as error:
        raise BadQuery(
            f"the query was ended after {seconds:g} s: ask for less (a where, a limit, a join with"
            " a condition)"
        ) from error
    finally:
        timer.cancel()


def _nested(query: str) -> int:
    """The most brackets that are open at once; those in texts and comments count, too."""
    depth = most = 0
    for letter in query:
        if letter in "([{":
            depth += 1
            most = max(most, depth)
        elif letter in ")]}":
            depth = max(0, depth - 1)
    return most


def _mixed_labels(store: FeatureStore) -> tuple[str, str] | None:
    """Two columns of `documents` whose names are the same for SQL (in stores made elsewhere)."""
    seen: dict[str, str] = {}
    for name in (*RESERVED, *store.label_names):
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return other, name
    return None


def _register(connection: Any, store: FeatureStore, query: str, documents: bool) -> None:
    import duckdb

    names = {
        "features": [f"{layer_folder(Path(), layer)}/features.parquet" for layer in store.layers],
        "tokens": ["tokens.parquet"],
    }
    if documents:
        names["documents"] = ["documents.parquet"]
    if store.url is not None:  # at a URL: only what the query may need is fetched
        names = {v: n for v, n in names.items() if re.search(rf"\b{v}\b", query, re.IGNORECASE)}
        for shard in store.shards:
            assert shard.remote is not None
            shard.remote.fetch_all(name for some in names.values() for name in some)
    allowed = []
    for view, some in names.items():
        paths = [shard.path(name) for shard in store.shards for name in some]
        for path in paths:
            if not path.is_file():
                raise StoreDamaged(f"{path} is missing. {REPAIR}")
        listed = ", ".join(_quoted(path) for path in paths)
        allowed.append(listed)
        try:
            connection.execute(
                f"create view {view} as select * from"
                f" read_parquet([{listed}], union_by_name = {view == 'documents'})"
            )
        except duckdb.Error as error:
            words = " ".join(str(error).split())
            raise StoreDamaged(
                f"{store.place}: {view} cannot be read: {words}. {REPAIR}"
            ) from error
    # From here on, nothing outside the store can be read and nothing can be changed.
    where = (
        f"set allowed_paths = [{', '.join(allowed)}]"
        if store.url is not None
        else f"set allowed_directories = [{_quoted(store.path)}]"
    )
    connection.execute(
        f"{where}; set enable_external_access = false; set lock_configuration = true"
    )


def _quoted(path: Path) -> str:
    return "'" + str(path.resolve()).replace("'", "''") + "'"
