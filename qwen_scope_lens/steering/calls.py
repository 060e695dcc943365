"""Which tokens a running model is working on: prompt or generated, where in the text, pads.

A forward pass shows a few columns of a longer table: with a cache one column, without one all of
them again. `Watch` follows the passes of a model, so that every column has the same name however
it is computed. It edits nothing; what is selected by these names is `select.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.layers import describe, part, places_of, unwrap

__all__ = ["Call", "Watch", "watching"]


@dataclass(frozen=True)
class Call:
    """One forward pass over columns `past .. past + columns` of every row."""

    rows: int
    columns: int
    past: int  # columns that a cache holds already
    prompt: int  # columns from here on are generated
    ids: Tensor | None  # [rows, past + columns] as far as known; None when embeddings came in
    real: Tensor | None  # bool [rows, past + columns], False for pads; None: no pads
    generating: bool  # inside `generate`, which may have multiplied the rows

    @property
    def in_prompt(self) -> bool:
        """Whether some column of this pass belongs to the prompt."""
        return self.past < self.prompt

    @property
    def in_generation(self) -> bool:
        return self.past + self.columns > self.prompt


class Watch:
    """The state of the passes of one model, kept by hooks for the time of a context."""

    def __init__(self, model: Any) -> None:
        self.name = describe(model)
        self.call: Call | None = None
        self.cache: dict[Any, Any] = {}  # of what was derived from `call`
        self._inside = 0  # depth of `generate`
        self._prompt: int | None = None
        self._ids: Tensor | None = None
        self._outer_waits = False

    def before(
        self, module: Any, args: Any, kwargs: dict[str, Any], names: Sequence[str], outer: bool
    ) -> None:
        """A pass begins, at the whole model or at the text model inside it."""
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if not outer and self._outer_waits:  # the same pass, a floor below
            self._outer_waits = False
            if self.call is not None:
                return
        self.call = None
        self._outer_waits = outer
        table = ids if ids is not None else embeds
        if table is None:
            return  # the model itself will complain
        self.call = self._made(table, ids, kwargs)
        self.cache = {}

    def _made(self, table: Tensor, ids: Tensor | None, kwargs: dict[str, Any]) -> Call:
        rows, columns = table.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + columns
        if not self._inside and past == 0:
            self._prompt = total
        elif self._prompt is None:
            # The first pass of `generate`, or a cache from before the context.
            self._prompt = total if self._inside else past
        history = self._history(ids, past)
        return Call(
            rows,
            columns,
            past,
            self._prompt,
            history,
            self._real(kwargs.get("attention_mask"), rows, columns, total),
            bool(self._inside),
        )

    def _history(self, ids: Tensor | None, past: int) -> Tensor | None:
        if ids is None:
            self._ids = None
        elif past == 0:
            self._ids = ids
        elif self._ids is not None and self._ids.shape[1] >= past and len(self._ids) == len(ids):
            self._ids = torch.cat([self._ids[:, :past].to(ids.device), ids], dim=1)
        else:
            self._ids = None
        return self._ids

    def _real(self, mask: Any, rows: int, columns: int, total: int) -> Tensor | None:
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total:
            return mask[:, :total].bool()
        if isinstance(mask, Tensor) and mask.ndim == 2 and rows == 1 and bool(mask.all()):
            return None
        if mask is None or rows == 1:
            return None
        raise WrongModel(
            f"{self.name} was run on {rows} rows with an attention mask that does not tell pads"
            f" from tokens: expected [{rows}, {total}], one flag a token"
        )

    @contextmanager
    def generation(self, prompt: int | None) -> Iterator[None]:
        """A call of `generate`; `prompt` columns where they are known before the first pass."""
        if self._inside == 0:
            self._prompt = prompt
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._prompt = None


@contextmanager
def watching(model: Any) -> Iterator[Watch]:
    """Follow the passes of a model or bridge until the block ends."""
    inner = unwrap(model)
    root_path = places_of(model).root.rstrip(".")
    root = part(model, root_path) if root_path else inner
    watch = Watch(model)
    undo: list[Callable[[], None]] = []
    try:
        for module in dict.fromkeys((inner, root)):
            names = tuple(inspect.signature(module.forward).parameters)
            outer = module is inner and inner is not root
            hook = functools.partial(watch.before, names=names, outer=outer)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            undo.append(handle.remove)
        for holder in dict.fromkeys((model, inner)):
            for name in ("generate", "generate_stream"):
                if callable(getattr(holder, name, None)):
                    undo.append(_wrap(holder, name, watch))
        yield watch
    finally:
        for step in reversed(undo):
            step()


def _wrap(holder: Any, name: str, watch: Watch) -> Callable[[], None]:
    """Put a method on the object that says when it runs; returns what takes it away again."""
    before = vars(holder).get(name)
    original = getattr(holder, name)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with watch.generation(_prompt_columns(args, kwargs)):
            return original(*args, **kwargs)

    @functools.wraps(original)
    def generate_stream(*args: Any, **kwargs: Any) -> Any:
        with watch.generation(_prompt_columns(args, kwargs)):
            yield from original(*args, **kwargs)

    vars(holder)[name] = generate if name == "generate" else generate_stream

    def undo() -> None:
        if before is None:
            vars(holder).pop(name, None)
        else:
            vars(holder)[name] = before

    return undo


def _prompt_columns(args: Any, kwargs: dict[str, Any]) -> int | None:
    for value in (*args[:1], *(kwargs.get(k) for k in ("input_ids", "inputs", "input"))):
        if isinstance(value, Tensor) and value.ndim == 2:
            return int(value.shape[1])
    return None
