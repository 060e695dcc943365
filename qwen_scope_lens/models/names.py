"""Hook points by name: checked before a run, each reported once, results in the right dtype.

The part of `ScopeBridge` that knows names and stopping early. SAEs are in `attach.py`, texts and
generation in `bridge.py`.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from qwen_scope_lens.errors import LayerOutOfRange, UnknownHook
from qwen_scope_lens.models.cache import CachedByName, ScopeCache
from qwen_scope_lens.models.layers import describe

__all__ = ["Hook", "NamedHooks", "Names"]

Names = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class NamedHooks(SAETransformerBridge):
    """A bridge on which a misspelt hook raises instead of never firing."""

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by every name, aliases and the inner hooks of attached SAEs included."""
        known = self.__dict__.get("_known_hooks")
        if known is None or known[0] != len(self._hook_registry):
            known = (len(self._hook_registry), TransformerBridge.hook_dict.fget(self))
            self.__dict__["_known_hooks"] = known
        hooks = dict(known[1])
        for name, wrapper in self.__dict__.get("_acts_to_saes", {}).items():
            at = wrapper.sae.cfg.metadata.hook_name_out or name
            for prefix in dict.fromkeys((at, self._resolve_hook_name(at))):
                for inner, hook in wrapper.inner_hooks().items():
                    hooks[f"{prefix}.{inner}"] = hook
        return hooks

    def check_hook(self, name: str, stop_at_layer: int | None = None) -> str:
        """The name as given; raises for one that does not exist or that the run never reaches."""
        hooks = self.hook_dict
        if name not in hooks:
            near = difflib.get_close_matches(name, hooks, n=3)
            if (found := re.match(r"blocks\.(\d+)\.", name)) and int(found[1]) >= len(self.blocks):
                hint = f"layers are 0..{len(self.blocks) - 1}"
            elif near:
                hint = f"nearest: {', '.join(near)}"
            else:
                hint = "hook_dict lists all"
            raise UnknownHook(
                f"no hook point is named {name!r}; {hint}. The thin adapter has the residual"
                " stream only, load_model(full_hooks=True) has the others"
            )
        layer = re.match(r"blocks\.(\d+)\.", name)
        late = layer is not None and stop_at_layer is not None and int(layer[1]) >= stop_at_layer
        if late or (stop_at_layer is not None and name.startswith(("unembed", "hook_unembed"))):
            raise UnknownHook(f"{name} is never reached: this run stops at layer {stop_at_layer}")
        return name

    def _points(self, names: Names, stop: int | None = None) -> list[tuple[str, HookPoint]]:
        """The hook points of a name, of names or of a filter: each point once."""
        hooks = self.hook_dict
        if names is None or callable(names):
            # What a point is reported as comes first: TransformerLens's name, or of a point inside
            # an SAE the one that SAELens's get_sae_hook_name gives.
            wanted = sorted(
                (
                    n
                    for n in hooks
                    if (names is None or names(n)) and self._gated_hook_reason(n) is None
                ),
                key=lambda n: (n == hooks[n].name) != (".hook_sae_" in n),
            )
            if not wanted:
                raise UnknownHook("the filter matches no hook point; hook_dict lists all")
            found: dict[int, tuple[str, HookPoint]] = {}
            for name in wanted:
                found.setdefault(id(hooks[name]), (name, hooks[name]))
            return list(found.values())
        listed = [names] if isinstance(names, str) else list(names)
        return [(self.check_hook(name, stop), hooks[name]) for name in listed]

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Names = None,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache: one entry for each hook point, under the name that was asked for.

        A filter or None lists TransformerLens's names (`hook_resid_post`, not `hook_out`), and of
        what is inside an SAE the name of `get_sae_hook_name`. Look-ups know every name of a point.
        """
        if isinstance(input, str):
            input = self._run_tokens(input)
        if "unembed" not in self._modules and stop_at_layer is None:
            kwargs.setdefault("return_type", None)
        stop = self._stop(stop_at_layer)
        points = self._points(names_filter, stop)
        wanted = {name for name, _ in points}
        with self._stopping(stop):
            output, cache = super().run_with_cache(
                input,
                return_cache_object=False,
                remove_batch_dim=remove_batch_dim,
                names_filter=lambda name: name in wanted,
                **kwargs,
            )
        listed = {id(point): name for name, point in reversed(points)}
        names = {n: listed[id(p)] for n, p in self.hook_dict.items() if id(p) in listed}
        if return_cache_object:
            return output, ScopeCache(cache, names, self, has_batch_dim=not remove_batch_dim)
        # Hooks that stay attached go on writing into this very dictionary.
        stays = kwargs.get("reset_hooks_end") is False
        return output, cache if stays else CachedByName(cache, names)

    def run_with_hooks(
        self,
        input: Any,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        names_filter: Names = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with hooks `(activation, hook) -> activation | None`; float32 results are cast."""
        stop = self._stop(stop_at_layer)
        for names, _ in (*fwd_hooks, *bwd_hooks):
            self._points(names, stop)
        with self._stopping(stop):
            return super().run_with_hooks(
                input,
                fwd_hooks=[(names, _in_dtype(hook)) for names, hook in fwd_hooks],
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                return_type=return_type,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    def hooks(
        self, fwd_hooks: Sequence[Hook] = (), bwd_hooks: Sequence[Hook] = (), **kwargs: Any
    ) -> Any:
        """A context in which hooks are active, also while generating."""
        for names, _ in (*fwd_hooks, *bwd_hooks):
            self._points(names)
        forward = [(names, _in_dtype(hook)) for names, hook in fwd_hooks]
        return super().hooks(fwd_hooks=forward, bwd_hooks=list(bwd_hooks), **kwargs)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Add a hook until `reset_hooks`, at one point or at all that a filter accepts."""
        for found, point in self._points(name):
            if not callable(name):
                self.check_hooks_to_add(found)
            hook = _in_dtype(hook_fn) if dir == "fwd" else hook_fn
            point.add_hook(hook, dir=dir, is_permanent=is_permanent)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks, also from inside attached SAEs. SAEs stay: see `reset_saes`."""
        for wrapper in self._acts_to_saes.values():
            for hook in wrapper.inner_hooks().values():
                hook.remove_hooks(direction, including_permanent=including_permanent, level=level)
                if clear_contexts:
                    hook.clear_context()
        super().reset_hooks(clear_contexts, direction, including_permanent, level)

    def _stop(self, stop_at_layer: int | None) -> int | None:
        """Layers to run, from 0 (embeddings only) to all; negative counts from the end."""
        if stop_at_layer is None:
            return None
        count = len(self.blocks)
        stop = stop_at_layer + count if stop_at_layer < 0 else stop_at_layer
        if not 0 <= stop <= count:
            raise LayerOutOfRange(f"stop_at_layer={stop_at_layer}: {describe(self)} has {count}")
        return stop

    @contextmanager
    def _stopping(self, stop: int | None) -> Iterator[None]:
        """End this thread's forward passes after `stop` layers, by an exception that upstream
        catches. Another thread's pass through the same layers goes on."""
        if stop is None:
            yield
            return
        mine = threading.get_ident()

        def before(module: Any, args: Any) -> None:
            if threading.get_ident() == mine:
                raise StopAtLayerException(args[0])

        def after(module: Any, args: Any, output: Any) -> None:
            if threading.get_ident() == mine:
                raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)

        if stop == 0:
            handle = self.blocks[0].register_forward_pre_hook(before)
        else:
            handle = self.blocks[stop - 1].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _in_dtype(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, its result in the dtype of what it was given."""

    @wraps(hook)
    def cast(activation: Any, *args: Any, **kwargs: Any) -> Any:
        result = hook(activation, *args, **kwargs)
        if isinstance(result, Tensor) and result.dtype != activation.dtype:
            return result.to(activation.dtype)
        return result

    return cast
