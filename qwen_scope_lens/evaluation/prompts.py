"""The items of a benchmark as prompts: which file, which column, which template.

Where the paper is silent about the prompt, the user decides: a column as it is, a template over the
row's columns, with or without the chat template. Tasks of lm-eval are rendered by lm-eval
(`lm_tasks.py`). What a prompt activates is `suite.py`.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.features.corpus import Document, read_rows

__all__ = ["COLUMNS", "PromptFormat", "read_prompts", "rendered", "sampled"]

COLUMNS = ("prompt", "question", "text", "input", "problem")
"""Tried in this order when neither a column nor a template is given."""

KEYS = ("key", "id", "task_id", "question_id")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt. It is kept beside the store, so that new items get the same."""

    column: str | None = None
    template: str | None = None  # "Question: {question}\nA. {choices[0]}\nAnswer:"
    chat: bool = False  # as the user's message, with the template's opening of the reply
    split: str | None = None  # of a Hugging Face dataset

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(path: str | os.PathLike[str], how: PromptFormat) -> Iterator[Document]:
    """The prompts of a file, a folder of `datasets`, or a dataset on the hub."""
    if how.column and how.template:
        raise BadCorpus("pass a column or a template, not both")
    if any(_utf8(part) != part for part in (how.column or "", how.template or "")):
        raise BadCorpus("the column or the template has half a character, which no text can hold")
    count = 0
    for count, (where, row) in enumerate(read_rows(path, split=how.split), start=1):
        text = rendered(row, how, where)
        named = _utf8(str(next((row[k] for k in KEYS if row.get(k) is not None), count - 1)))
        if how.chat:
            yield Document(named, None, ({"role": "user", "content": text},), {})
        else:
            yield Document(named, text, None, {})
    if not count:
        raise BadCorpus(f"{path} has no items")


def sampled(n: int, limit: int | None, seed: int = 0) -> list[int]:
    """At most `limit` of 0..n-1, drawn by lot without replacement, ascending.

    A simple random sample, also over the subtasks of a group: equations 4 and 7 are about random
    subsets, and the first items of a file are none (the first of MMLU are all of one subject).
    """
    if limit is None or limit >= n:
        return list(range(n))
    numbers = np.random.default_rng(seed).choice(n, limit, replace=False)
    return [int(number) for number in np.sort(numbers)]


def rendered(row: Mapping[str, Any], how: PromptFormat, where: str) -> str:
    """The prompt of one row."""
    if not isinstance(row, Mapping):
        raise BadCorpus(f"{where} is a {type(row).__name__}: expected an object with columns")
    have = ", ".join(map(str, row))
    if how.template is not None:
        try:
            text = _Strict().vformat(how.template, (), row)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise BadCorpus(
                f"{where} does not fit the template ({type(error).__name__}: {error}). It has"
                f" {have}; a literal brace is written twice, as in {{{{}}}}"
            ) from error
    else:
        column = how.column or next((name for name in COLUMNS if name in row), None)
        if column is None or column not in row:
            wanted = repr(how.column) if how.column else "of " + ", ".join(COLUMNS)
            raise BadCorpus(
                f"{where} has no column {wanted}: it has {have}. Name the column with --column, or"
                " write a --template"
            )
        if not isinstance(row[column], str):
            raise BadCorpus(
                f"{where}: {column} is a {type(row[column]).__name__}, expected a text. A"
                " --template can make one of it"
            )
        text = row[column]
    if not text.strip():
        raise BadCorpus(f"{where}: the prompt is empty")
    return _utf8(text)


def _utf8(text: str) -> str:
    """Half characters, which no file can hold, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Strict(string.Formatter):
    """`{name}` and `{name[0]}` of the row; nothing else of Python is reachable."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "." in field_name or not field_name or field_name.isdecimal():
            raise ValueError(f"{{{field_name}}} is no column: write {{name}} or {{name[0]}}")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise ValueError(f"a width or precision of {format_spec[:20]}: at most 9999")
        return super().format_field(value, format_spec)
