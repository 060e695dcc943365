"""Corpora: files of documents with a key, a text or a chat, and labels.

The formats are JSON Lines, plain text (one document per line), CSV and TSV, Parquet, and Hugging
Face datasets (a folder of `save_to_disk`, or a name on the hub). A corpus is read as a stream, as
often as needed. `corpus_formats.py` reads the files; `models/tokenize.py` makes the tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.files import is_url
from qwen_scope_lens.stores.corpus_formats import READERS, Datasets, Given, suffix_of
from qwen_scope_lens.stores.manifest import RESERVED, join_label_types

__all__ = ["Corpus", "Document", "Survey", "as_corpus", "read_corpus", "read_rows", "survey"]

KEYS = ("key", "id")
TEXTS = ("text", "messages")
HUB_NAME = r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?"

_BEYOND_INT64 = 2**63

Label = bool | int | float | str | None


@dataclass(frozen=True)
class Document:
    """One document: a text, or a chat that the template turns into one."""

    key: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    labels: dict[str, Label] = field(default_factory=dict)

    @property
    def content(self) -> str | list[Mapping[str, Any]]:
        """The text or the messages, as `iter_captures` takes them."""
        return self.text if self.text is not None else list(self.messages or ())


@dataclass(frozen=True)
class Corpus:
    """Documents that can be iterated over any number of times."""

    name: str
    source: _Source
    size: int | None = None  # bytes on disk

    def __iter__(self) -> Iterator[Document]:
        return self.source.documents()

    def check_label(self, name: str) -> None:
        """Raise where the first document has no such label, before a long extraction."""
        for document in self:
            if name not in document.labels:
                raise BadCorpus(
                    f"{self.name} has no column {name!r}: it has"
                    f" {', '.join(document.labels) or 'no other columns'}"
                )
            return
        raise BadCorpus(f"{self.name} has no documents")


@dataclass(frozen=True)
class Survey:
    """The facts that one pass over a corpus finds out."""

    n_docs: int
    characters: int
    sha256: str  # over keys, contents and labels
    labels: dict[str, str]  # name -> bool, int, float or str
    has_chats: bool


def read_corpus(
    path: str | os.PathLike[str],
    text: str | None = None,
    labels: Sequence[str] | None = None,
    *,
    key: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    skip_empty: bool = False,
) -> Corpus:
    """Open a corpus: a file, a folder of `datasets`, or a dataset on the hub.

    A dataset on the hub is `owner/name` or `owner/name:config`, at `revision` (a commit, tag or
    branch) if one is given. Files of lines may be gzipped (`.jsonl.gz`). `text` names the column of
    the text or of the chat messages (by default `text`, else `messages`), `key` the column of the
    documents' names (by default `key`, else `id`, else they are numbered). `labels` names the
    columns to keep; by default these are all other columns with plain values (texts, numbers,
    booleans). Empty texts are an error unless `skip_empty`. Unpaired surrogates, which tokenizers
    refuse, become U+FFFD.
    """
    columns = _Columns(text, None if labels is None else tuple(labels), key, skip_empty)
    place, reader = _opened(path, split, revision)
    size = place.stat().st_size if isinstance(place, Path) and place.is_file() else None
    return Corpus(str(path), _Source(place, reader, columns), size)


def read_rows(
    path: str | os.PathLike[str], *, split: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, Row]]:
    """The rows of anything that `read_corpus` reads, each with its place for error messages."""
    place, reader = _opened(path, split, revision)
    yield from reader(place)


def _opened(
    path: str | os.PathLike[str], split: str | None, revision: str | None
) -> tuple[Any, Reader]:
    """The file, folder or hub name that is meant, and its reader."""
    if is_url(path):
        from qwen_scope_lens.stores.remote import fetch_corpus

        path = fetch_corpus(str(path))
    place = Path(path).expanduser()
    if place.is_file():
        suffix = suffix_of(place)
        if suffix not in READERS:
            raise BadCorpus(
                f"{place}: {suffix or 'a file without an ending'} is not a known format. Expected"
                f" one of {', '.join(READERS)}, a folder of datasets.save_to_disk or a hub name"
            )
        return place, READERS[suffix]
    if place.is_dir():
        return place, Datasets(split, on_hub=False)
    if place.exists():
        raise BadCorpus(
            f"{path} is neither a file nor a folder: a corpus is read several times, which a pipe"
            " or a device does not allow. Write it to a file first"
        )
    if suffix_of(place) in READERS or not re.fullmatch(HUB_NAME, str(path)):
        raise BadCorpus(f"{path} does not exist")
    return path, Datasets(split, on_hub=True, revision=revision)


def as_corpus(documents: Any, name: str = "documents given in Python") -> Corpus:
    """Make a corpus of a sequence of texts, chats, rows (mappings) or Documents."""
    if isinstance(documents, Corpus):
        return documents
    if isinstance(documents, (str, os.PathLike)):
        raise BadCorpus(
            "expected documents, found one text or path: put a text into a list, or pass"
            " read_corpus(path)"
        )
    return Corpus(name, _Source(name, Given(list(documents)), _Columns()))


def survey(corpus: Iterable[Document], name: str) -> Survey:
    """Go through a corpus once: count, hash, find the types of the labels, refuse bad rows."""
    digest = hashlib.sha256()
    labels: dict[str, str] = {}
    count = characters = 0
    has_chats = False
    keys: set[int] = set()
    for document in corpus:
        count += 1
        has_chats |= document.messages is not None
        content = document.content
        row = [document.key, content, document.labels]
        line = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
        characters += len(content) if isinstance(content, str) else len(line)
        keys.add(hash(document.key))
        for label, value in document.labels.items():
            if value is None:
                labels.setdefault(label, "")
                continue
            kind = type(value).__name__
            if isinstance(value, int) and abs(value) >= _BEYOND_INT64:
                kind = "str"
            labels[label] = join_label_types(labels.get(label) or kind, kind)
    if not count:
        raise BadCorpus(f"{name} has no documents")
    if len(keys) < count:
        raise BadCorpus(
            f"{name}: {count - len(keys):,} documents have the same key as another one. A key must"
            " name one document: pass key=... (--key) with a column of unique values"
        )
    for label in labels:
        for other in (*RESERVED, *labels):
            if label != other and label.casefold() == other.casefold():
                raise BadCorpus(
                    f"{name}: the label {label!r} and the column {other!r} differ only in case,"
                    " which SQL does not tell apart: rename one, or choose labels without it"
                    " (labels=[...], --label-columns)"
                )
    known = {label: kind or "str" for label, kind in labels.items()}
    return Survey(count, characters, digest.hexdigest(), known, has_chats)


Row = Mapping[str, Any]
Reader = Callable[[Any], Iterator[tuple[str, Any]]]


@dataclass(frozen=True)
class _Columns:
    text: str | None = None
    labels: tuple[str, ...] | None = None
    key: str | None = None
    skip_empty: bool = False


@dataclass(frozen=True)
class _Source:
    place: Any
    reader: Any
    columns: _Columns

    def documents(self) -> Iterator[Document]:
        for number, (where, row) in enumerate(self.reader(self.place)):
            if isinstance(row, Document):
                document: Document | None = row
            elif isinstance(row, Mapping):
                document = _document(row, number, where, self.columns)
            else:
                raise BadCorpus(f"{where} is a {type(row).__name__}: expected an object")
            if document is not None and (document := _checked(document, where, self.columns)):
                yield document


def _document(row: Row, number: int, where: str, columns: _Columns) -> Document:
    text = columns.text or next((name for name in TEXTS if name in row), None)
    if text is None or text not in row:
        wanted = repr(columns.text) if columns.text else "'text' or 'messages'"
        raise BadCorpus(f"{where} has no column {wanted}: it has {', '.join(map(str, row))}")
    key = columns.key or next((name for name in KEYS if name in row), None)
    if columns.key and (columns.key not in row or row[columns.key] is None):
        raise BadCorpus(f"{where} has no key {columns.key!r}: it has {', '.join(map(str, row))}")
    content = row[text]
    named = str(number) if key is None or row[key] is None else str(row[key])
    labels = _labels(row, {text, key}, where, columns.labels)
    if isinstance(content, str):
        return Document(_whole(named), _whole(content), None, labels)
    if content is None:
        return Document(_whole(named), "", None, labels)
    if isinstance(content, Sequence) and all(isinstance(m, Mapping) for m in content):
        for message in content:
            if "role" not in message or not isinstance(message.get("content"), str):
                raise BadCorpus(f"{where}: a message of a chat needs a role and a content (text)")
        messages = tuple({k: _clean(v) for k, v in m.items() if v is not None} for m in content)
        return Document(_whole(named), None, messages, labels)
    raise BadCorpus(
        f"{where}: {text} is a {type(content).__name__}, expected a text or a list of messages"
    )


def _labels(
    row: Row, used: set[str | None], where: str, wanted: tuple[str, ...] | None
) -> dict[str, Label]:
    found: dict[str, Label] = {}
    for name in row if wanted is None else wanted:
        if wanted is None and (name in used or name in RESERVED):
            continue
        if not isinstance(name, str) or not name or _whole(name) != name:
            if wanted is None:
                continue  # a column without a name, or with a name that a file cannot hold
            raise BadCorpus(f"{name!r} cannot be the name of a label: rename the column")
        if name not in row:
            raise BadCorpus(f"{where} has no column {name!r}: it has {', '.join(map(str, row))}")
        if name in RESERVED:
            raise BadCorpus(
                f"a label cannot be called {name!r}, because every store has a column of that name:"
                " rename it"
            )
        value = row[name]
        if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # numpy scalars
            value = value.item()
        if value is None or isinstance(value, (bool, int)):
            found[name] = value
        elif isinstance(value, float):
            found[name] = None if math.isnan(value) else value
        elif isinstance(value, str):
            found[name] = _whole(value)
        elif wanted is not None:
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def _checked(document: Document, where: str, columns: _Columns) -> Document | None:
    if (document.text is not None and document.text == "") or document.messages == ():
        if columns.skip_empty:
            return None
        raise BadCorpus(
            f"{where} is empty: remove it, or pass skip_empty=True (--skip-empty) to leave such"
            " documents out"
        )
    return document


def _whole(text: str) -> str:
    """The text with unpaired surrogates (halves of a character beyond U+FFFF) replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _clean(value: Any) -> Any:
    return _whole(value) if isinstance(value, str) else value
