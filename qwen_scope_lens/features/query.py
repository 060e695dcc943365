"""SQL over a store: DuckDB on its Parquet files, reading only.

The views: `features` (layer, feature, doc, position, value), `documents` (doc, key, text, n_tokens,
truncated, labels) and `tokens` (doc, position, token_id, token, start, end, extreme_<layer>).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from qwen_scope_lens.errors import BadQuery, StoreDamaged

if TYPE_CHECKING:
    from qwen_scope_lens.features.store import FeatureStore

__all__ = ["run_query"]

VIEWS = "features, documents and tokens"


def run_query(store: FeatureStore, query: str) -> pa.Table:
    """The answer to one SELECT."""
    import duckdb

    if not store.shards:
        raise StoreDamaged(f"{store.path} has no finished document yet: let `qsl extract` run")
    with duckdb.connect() as connection:
        _register(connection, store)
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1:
                raise BadQuery(f"expected one SELECT, found {len(statements)} statements")
            kind = statements[0].type
            if kind != duckdb.StatementType.SELECT:
                raise BadQuery(
                    f"a store is only read: expected a SELECT over {VIEWS}, found"
                    f" {str(kind).rpartition('.')[2]}"
                )
            return connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            words = " ".join(str(error).split())
            raise BadQuery(f"DuckDB: {words} (the views are {VIEWS})") from error


def _register(connection: object, store: FeatureStore) -> None:
    files = {
        "features": [s.features_path(layer) for s in store.shards for layer in store.layers],
        "documents": [s.path("documents.parquet") for s in store.shards],
        "tokens": [s.path("tokens.parquet") for s in store.shards],
    }
    for view, paths in files.items():
        listed = ", ".join(_quoted(path) for path in paths)
        connection.execute(  # type: ignore[attr-defined]
            f"create view {view} as select * from"
            f" read_parquet([{listed}], union_by_name = {view == 'documents'})"
        )
    # From here on: nothing outside the store can be read, nothing at all can be changed.
    connection.execute(  # type: ignore[attr-defined]
        f"set allowed_directories = [{_quoted(store.path)}]; set enable_external_access = false;"
        " set lock_configuration = true"
    )


def _quoted(path: Path) -> str:
    return "'" + str(path.resolve()).replace("'", "''") + "'"
