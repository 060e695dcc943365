"""Prompts of lm-eval tasks, rendered by lm-eval itself. Needs the extra `lm-eval`.

What lm-eval would send to a model is what is read here: its templates, few-shot examples and chat
rendering. The answer choices of a question share one prompt and count as one item. A group, such as
MMLU with its 57 subjects, is one benchmark; its items are called SUBTASK/NUMBER.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadCorpus, UnknownName
from qwen_scope_lens.evaluation.prompts import sampled
from qwen_scope_lens.extras import require
from qwen_scope_lens.features.corpus import Document

__all__ = ["FEWSHOT_SEED", "task_prompts"]

FEWSHOT_SEED = 1234
"""lm-eval's own default."""


def task_prompts(
    names: Sequence[str],
    include_path: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    chat_template: Callable[..., str] | None = None,
    seed: int = 0,
    apart: bool = False,
) -> dict[str, list[Document]]:
    """Name -> its prompts. A group is one benchmark; with `apart`, each of its tasks is one.

    `include_path` is a folder with task files of your own; `fewshot` replaces the task's own number
    of examples; `limit` draws that many of a benchmark's documents by lot, from all subtasks alike;
    `chat_template(messages, add_generation_prompt=...)` renders a chat. A tag of lm-eval is not a
    group: it has no score of its own, and stands for its tasks.
    """
    manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = f" or {include_path}" if include_path else " (--task-path adds your own)"
        raise UnknownName(f"no task {', '.join(unknown)} in lm-eval{where}: see `lm-eval ls tasks`")
    found: dict[str, list[Document]] = {}
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # lm-eval downloads the data set, which may fail in many ways
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
    """lm-eval's index of tasks. Its own thousands of files are read only if they are needed."""
    make = require("lm_eval.tasks", "lm-eval").TaskManager
    if include_path is None:
        return make()
    if not Path(include_path).is_dir():
        raise BadCorpus(f"{include_path} is no folder of lm-eval tasks")
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
    """The prompts of a task's documents with these numbers, ascending."""
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
        number = numbers[at]  # lm-eval counts the documents that it was asked for
        for choice, text in enumerate(prompts):  # several where the choices have their own prompts
            if not text.strip():
                raise BadCorpus(f"task {name}, document {number}: lm-eval renders an empty prompt")
            key = f"{prefix}{number}" if len(prompts) == 1 else f"{prefix}{number}/{choice}"
            documents.append(Document(key, text, None, {}))
    return documents
