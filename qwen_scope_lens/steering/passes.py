"""Places a `Watch` (`calls.py`) on a model and takes it away again.

Hooks on the whole model and on the text model inside it see the passes; a wrapper around `generate`
says when it begins and ends. A compiled model has hooks of its own, which check that each of its
calls was seen by the hooks inside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qwen_scope_lens.errors import PlanBypassed, WrongModel
from qwen_scope_lens.models.architecture import part, places_of, unwrap
from qwen_scope_lens.steering.calls import OfOneModel, Watch

__all__ = ["watching"]

_OWN_ENGINES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of transformers' continuous batching, which packs many requests into one row."""


@contextmanager
def watching(model: Any, layers: Sequence[int] = ()) -> Iterator[Watch]:
    """Follow the passes of a model or bridge until the block ends.

    A pass that ends without a visit to `Watch.at_layer` from each of `layers` raises.
    """
    inner = unwrap(model)
    root_path = places_of(model).root.rstrip(".")
    root = part(model, root_path) if root_path else inner
    watch = Watch(model, root, layers)
    undo: list[Callable[[], None]] = []
    try:
        for module in dict.fromkeys((inner, root)):
            names = tuple(inspect.signature(module.forward).parameters)
            outer = module is inner and inner is not root
            hook = functools.partial(watch.before, names=names, outer=outer)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.append(module.register_forward_hook(watch.after).remove)
        if isinstance(compiled := _compiled(model), nn.Module):
            asked = _Asked(watch)
            undo.append(compiled.register_forward_pre_hook(asked.before).remove)
            undo.append(compiled.register_forward_hook(asked.after).remove)
        for holder in dict.fromkeys((model, inner)):
            for name, wrapper in (
                ("generate", _Generate),
                ("generate_stream", _Stream),
                *((name, _Refused) for name in _OWN_ENGINES),
            ):
                if callable(getattr(holder, name, None)):
                    undo.append(_wrap(holder, name, wrapper(watch, getattr(holder, name))))
        yield watch
    finally:
        for step in reversed(undo):
            step()


def _compiled(model: Any) -> nn.Module | None:
    """What `torch.compile(model)` returned, where that is what was given."""
    return model if "_orig_mod" in vars(model).get("_modules", {}) else None


class _Asked(OfOneModel):
    """Checks a compiled model by its own hooks, which run outside of its graph."""

    def __init__(self, watch: Watch) -> None:
        self.name, self._watch = watch.name, watch

    def before(self, module: Any, args: Any) -> None:
        self._watch.thread.at_call = self._watch.thread.passes

    def after(self, module: Any, args: Any, output: Any) -> None:
        if self._watch.thread.passes == self._watch.thread.at_call:
            raise PlanBypassed(
                f"{self.name} ran from a graph that knows no hooks, so the plan did nothing:"
                " change the compiler's stance outside of the block only"
            )


class _Wrapped(OfOneModel):
    """Stands for a method of the model and says when it runs. It belongs to one block."""

    def __init__(self, watch: Watch, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # type: ignore[arg-type]
        self.name, self._watch, self._original = watch.name, watch, original
        self.over = False

    def _begin(self, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.over:
            raise WrongModel(
                f"this is a copy of {self.name} that was made while a plan was active: its"
                f" {self._original.__name__} is the original's. Copy the model outside of the block"
            )
        columns, mask = _prompt_columns(args, kwargs), kwargs.get("attention_mask")
        return self._watch.generation(columns, mask, _beams(self._original, kwargs))


class _Generate(_Wrapped):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._begin(args, kwargs):
            out = self._original(*args, **kwargs)
            made = _new_columns(out, args, kwargs)
            if made is not None:
                self._watch.check_generated(made)
            return out


class _Stream(_Wrapped):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._begin(args, kwargs):
            yield from self._original(*args, **kwargs)


class _Refused(_Wrapped):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise WrongModel(
            f"{self._original.__name__} packs the tokens of many requests into one row, where a"
            " plan cannot tell the texts apart: call generate(), which takes a batch"
        )


def _wrap(holder: Any, name: str, wrapper: _Wrapped) -> Callable[[], None]:
    """Put the wrapper in the method's place. Returns the function that undoes it."""
    before = vars(holder).get(name)
    vars(holder)[name] = wrapper

    def undo() -> None:
        wrapper.over = True
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


def _beams(generate: Any, kwargs: dict[str, Any]) -> int:
    """How many beams this call of `generate` searches."""
    model = getattr(generate, "__self__", None)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return int(kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1)


def _new_columns(out: Any, args: Any, kwargs: dict[str, Any]) -> int | None:
    """How many columns `generate` has added; None where its output does not show it."""
    table = getattr(out, "sequences", out)
    given = _prompt_columns(args, kwargs)
    if given is None and isinstance(kwargs.get("inputs_embeds"), Tensor):
        given = 0
    if given is None or not isinstance(table, Tensor) or table.ndim != 2:
        return None
    return int(table.shape[1]) - given
