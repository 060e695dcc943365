"""The items of a benchmark as prompts: from files with a template, or rendered by lm-eval.

The paper does not describe its prompts, so the user decides: a column of the file, or a template
over its columns, with or without the chat template. `suite.py` then reads which features the
prompts activate.

For a task of lm-eval, the prompts are exactly what lm-eval would send to a model, with its
templates, few-shot examples and chat rendering. The answer choices of a question share one prompt
and count as one item. A group, such as MMLU with its 57 subjects, is one benchmark, and its items
are named SUBTASK/NUMBER.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadCorpus, UnknownName
from qwen_scope_lens.extras import require
from qwen_scope_lens.stores.corpus import Document, read_rows

__all__ = [
    "COLUMNS",
    "FEWSHOT_SEED",
    "PromptFormat",
    "prompts_of",
    "read_prompts",
    "rendered",
    "sampled",
    "task_prompts",
]

COLUMNS = ("prompt", "question", "text", "input", "problem")
"""The columns that are tried in this order if neither a column nor a template is given."""

LETTERS = "letters"

KEYS = ("key", "id", "task_id", "question_id")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt. It is saved beside the store and used again for new items."""

    column: str | None = None
    template: str | None = None  # "Question: {question}\nA. {choices[0]}\nAnswer:"
    chat: bool = False  # the text is the user's message in the chat template
    split: str | None = None  # of a Hugging Face dataset

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(path: str | os.PathLike[str], how: PromptFormat) -> Iterator[Document]:
    """Read the prompts of a file, a folder of `datasets`, or a dataset on the hub."""
    yield from prompts_of(read_rows(path, split=how.split), how, str(path))


def prompts_of(
    rows: Iterable[tuple[str, Mapping[str, Any]]], how: PromptFormat, name: str
) -> Iterator[Document]:
    """Make prompts of rows, each of which comes with its place for error messages."""
    if how.column and how.template:
        raise BadCorpus("pass a column or a template, not both")
    if any(_utf8(part) != part for part in (how.column or "", how.template or "")):
        raise BadCorpus("the column or the template holds half of a surrogate pair: expected text")
    count = 0
    for count, (where, row) in enumerate(rows, start=1):
        text = rendered(row, how, where)
        named = _utf8(str(next((row[k] for k in KEYS if row.get(k) is not None), count - 1)))
        if how.chat:
            yield Document(named, None, ({"role": "user", "content": text},), {})
        else:
            yield Document(named, text, None, {})
    if not count:
        raise BadCorpus(f"{name} has no items")


def sampled(n: int, limit: int | None, seed: int = 0) -> list[int]:
    """At most `limit` numbers of 0..n-1, drawn at random without replacement, ascending.

    It is a simple random sample, also over the subtasks of a group. Equations 4 and 7 are about
    random subsets, and the first items of a file are not random: the first items of MMLU all belong
    to one subject.
    """
    if limit is None or limit >= n:
        return list(range(n))
    numbers = np.random.default_rng(seed).choice(n, limit, replace=False)
    return [int(number) for number in np.sort(numbers)]


def rendered(row: Mapping[str, Any], how: PromptFormat, where: str) -> str:
    """Make the prompt of one row; `where` names the row in errors."""
    if not isinstance(row, Mapping):
        raise BadCorpus(f"{where} is a {type(row).__name__}: expected an object with columns")
    have = ", ".join(map(str, row))
    if how.template is not None:
        try:
            text = _Strict().vformat(how.template, (), row)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise BadCorpus(
                f"{where} does not fit the template ({type(error).__name__}: {error}). The row has"
                f" {have}. Write a literal brace twice, as in {{{{}}}}"
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
                f"{where}: {column} is a {type(row[column]).__name__}, expected a string. Use a"
                " --template to make a string of it"
            )
        text = row[column]
    if not text.strip():
        raise BadCorpus(f"{where}: the prompt is empty")
    return _utf8(text)


def _utf8(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Strict(string.Formatter):
    """Formats `{name}` and `{name[0]}` of a row and refuses access to anything else.

    `{name:letters}` writes a list as answer choices, one per line: A. .., B. .., and so on.
    """

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "." in field_name or not field_name or field_name.isdecimal():
            raise ValueError(f"{{{field_name}}} is not a column: write {{name}} or {{name[0]}}")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise ValueError(f"a width or precision of {format_spec[:20]}: expected at most 9999")
        if format_spec == LETTERS:
            if not isinstance(value, (list, tuple)) or len(value) > len(string.ascii_uppercase):
                raise ValueError(f"{LETTERS} is for a list of at most 26 answer choices")
            choices = zip(string.ascii_uppercase, value, strict=False)
            return "\n".join(f"{letter}. {choice}" for letter, choice in choices)
        return super().format_field(value, format_spec)


FEWSHOT_SEED = 1234
"""The default of lm-eval."""


def task_prompts(
    names: Sequence[str],
    include_path: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    chat_template: Callable[..., str] | None = None,
    seed: int = 0,
    apart: bool = False,
) -> dict[str, list[Document]]:
    """`{benchmark: prompts}`. A group is one benchmark; with `apart`, each of its tasks is one.

    `include_path` is a folder with your own task files. `fewshot` replaces the number of examples
    that the task sets. `limit` draws that many of a benchmark's documents at random from all
    subtasks together. `chat_template(messages, add_generation_prompt=...)` renders a chat. A tag of
    lm-eval is not a group, because it has no score: it stands for its tasks.
    """
    manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = f" or {include_path}" if include_path else " (--task-path adds your own)"
        raise UnknownName(
            f"lm-eval{where} has no task {', '.join(unknown)}: see `lm-eval ls tasks`"
        )
    found: dict[str, list[Document]] = {}
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # lm-eval downloads the dataset, which may fail in many ways
            raise BadCorpus(f"lm-eval cannot load task {name}: {error}") from error
        tasks = loaded["tasks"]
        merged = name in loaded.get("groups", ()) and not apart
        if merged:
            parts = {name: tasks}
        else:
            parts = {task_name: {task_name: task} for task_name, task in tasks.items()}
        for benchmark, members in parts.items():
            sizes = [len(task.eval_docs) for task in members.values()]
            chosen = sampled(sum(sizes), limit, seed)
            found[benchmark] = documents = []
            start = 0
            for (task_name, task), size in zip(members.items(), sizes, strict=True):
                mine = [i - start for i in chosen if start <= i < start + size]
                start += size
                if mine:
                    prefix = f"{task_name}/" if merged else ""
                    documents += _prompts(task_name, task, fewshot, mine, chat_template, prefix)
    return found


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks. Its thousands of own task files are read only if needed."""
    make = require("lm_eval.tasks", "lm-eval").TaskManager
    if include_path is None:
        return make()
    if not Path(include_path).is_dir():
        raise BadCorpus(f"{include_path} is not a folder: expected a folder of lm-eval task files")
    mine = make(include_path=str(include_path), include_defaults=False)
    if set(names) <= set(mine.all_tasks):
        return mine
    return make(include_path=str(include_path))


def _prompts(
    name: str,
    task: Any,
    fewshot: int | None,
    numbers: Sequence[int],
    chat_template: Callable[..., str] | None,
    prefix: str,
) -> list[Document]:
    """The prompts of the task's documents with these numbers, which are ascending."""
    if fewshot is not None:
        task.set_config(key="num_fewshot", value=fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        task.build_all_requests(
            samples=list(numbers),
            rank=0,
            world_size=1,
            apply_chat_template=chat_template is not None,
            chat_template=chat_template,
        )
    except Exception as error:  # a template of a task file may raise anything
        raise BadCorpus(f"lm-eval cannot render task {name}: {error}") from error
    texts: dict[int, dict[str, None]] = {}
    for request in task.instances:
        texts.setdefault(request.doc_id, {})[str(request.args[0])] = None
    documents = []
    for at, prompts in texts.items():
        number = numbers[at]  # lm-eval counts only the documents that it renders
        for choice, text in enumerate(prompts):  # several if each choice has its own prompt
            if not text.strip():
                raise BadCorpus(f"task {name}, document {number}: lm-eval rendered an empty prompt")
            key = f"{prefix}{number}" if len(prompts) == 1 else f"{prefix}{number}/{choice}"
            documents.append(Document(key, text, None, {}))
    return documents
