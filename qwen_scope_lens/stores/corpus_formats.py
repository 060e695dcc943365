"""The formats of corpora: each reader yields (place, row) pairs from a file or a dataset.

The place is for error messages. A row is a mapping of columns; `corpus.py` decides which of them
are the text, the key and the labels.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qwen_scope_lens.errors import BadCorpus, HubUnreachable

__all__ = ["READERS", "Datasets", "Given", "suffix_of"]

GZIPPED = ".gz"

MOST_IN_A_LINE = 2**26
"""The most characters in one line of a corpus."""


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadCorpus(f"{path}, line {number} is not JSON: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadCorpus(
            f"{path} is not JSON ({error}); files of JSON Lines end in .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise BadCorpus(f"{path} holds a {type(rows).__name__}: expected a list of objects")
    yield from ((f"{path}, entry {number}", row) for number, row in enumerate(rows))


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}, line {number}", {"text": line.rstrip("\r\n")}


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(
                _bounded(file, path),
                delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
                strict=True,
            )
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise BadCorpus(
                        f"{where} has a different number of fields than the header"
                        f" ({len(rows.fieldnames or ())}): quote texts that hold the separator"
                    )
                yield where, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadCorpus(f"{path} cannot be read as UTF-8 CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise BadCorpus(f"{path} cannot be read as Parquet: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with _open_text(path) as file:
            yield from enumerate(_bounded(file, path), start=1)
    except UnicodeDecodeError as error:
        raise BadCorpus(f"{path} is not UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadCorpus(f"{path} is not a whole gzip file: {error}") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == GZIPPED:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _bounded(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file. A line that is too long is refused, because it could fill the memory."""
    while line := file.readline(MOST_IN_A_LINE + 1):
        if len(line) > MOST_IN_A_LINE:
            raise BadCorpus(
                f"{path} has a line of more than {MOST_IN_A_LINE:,} characters: expected one"
                " document per line"
            )
        yield line


@dataclass(frozen=True)
class Given:
    """Reads documents that are in memory."""

    rows: list[Any]

    def __call__(self, name: Any) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(self.rows):
            where = f"document {number}"
            if isinstance(row, str):
                yield where, {"text": row}
            elif isinstance(row, Sequence) and row and isinstance(row[0], Mapping):
                yield where, {"messages": row}
            else:
                yield where, row


@dataclass(frozen=True)
class Datasets:
    """Reads a dataset of Hugging Face, from a folder or from the hub."""

    split: str | None
    on_hub: bool
    revision: str | None = None  # of a dataset on the hub

    def __call__(self, place: Any) -> Iterator[tuple[str, Any]]:
        import datasets

        try:
            if self.on_hub:
                name, _, config = str(place).partition(":")
                found = datasets.load_dataset(name, config or None, revision=self.revision)
            else:
                found = datasets.load_from_disk(str(place))
        except (ConnectionError, OSError) as error:
            if self.on_hub:
                raise HubUnreachable(
                    f"{place} is not a file here, and it cannot be fetched as a dataset: {error}"
                ) from error
            raise BadCorpus(f"{place} is not a folder of datasets.save_to_disk: {error}") from error
        except ValueError as error:
            raise BadCorpus(f"{place} cannot be read as a dataset: {error}") from error
        if isinstance(found, dict):
            if (self.split is None and len(found) > 1) or self.split not in (None, *found):
                raise BadCorpus(
                    f"{place} has the splits {', '.join(found)}: pass split=... (--split)"
                )
            found = found[self.split or next(iter(found))]
        for number, row in enumerate(found):
            yield f"{place}, row {number}", row


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonl.gz": _json_lines,
    ".ndjson.gz": _json_lines,
    ".txt.gz": _text,
    ".json": _json,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def suffix_of(path: Path) -> str:
    """The ending that names a file's format: `.jsonl`, or `.jsonl.gz` for a gzipped file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [GZIPPED] else "".join(suffixes[-1:])
