"""Hook points by name: names are checked before a run, and a cache knows every name of a point.

This is the part of `ScopeBridge` that deals with names and stops runs early. SAEs are attached in
`attached_saes.py`; texts and generation are in `bridge.py`.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor, nn
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.utils import get_act_name

from qwen_scope_lens.errors import LayerOutOfRange, UnknownHook
from qwen_scope_lens.models.architecture import describe

__all__ = ["Hook", "NamedHooks", "Names"]

Names = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class NamedHooks(SAETransformerBridge):
    """A bridge that raises for a misspelt hook. Upstream's hook would simply never fire."""

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by each of its names, also aliases and those inside attached SAEs."""
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
        """Return the name, or raise when it does not exist or the run never reaches it."""
        hooks = self.hook_dict
        if name not in hooks:
            near = difflib.get_close_matches(name, hooks, n=3)
            if (found := re.match(r"blocks\.(\d+)\.", name)) and int(found[1]) >= len(self.blocks):
                hint = f"layers are 0..{len(self.blocks) - 1}"
            elif near:
                hint = f"nearest: {', '.join(near)}"
            else:
                hint = "hook_dict lists all names"
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
        """The hook points of a name, of several names or of a filter. Each point is there once."""
        hooks = self.hook_dict
        if names is None or callable(names):
            # The first name found is the one that is reported. That is TransformerLens's own name,
            # or, for a point inside an SAE, the name from SAELens's get_sae_hook_name.
            wanted = sorted(
                (
                    n
                    for n in hooks
                    if (names is None or names(n)) and self._gated_hook_reason(n) is None
                ),
                key=lambda n: (n == hooks[n].name) != (".hook_sae_" in n),
            )
            if not wanted:
                raise UnknownHook("the filter matches no hook point; hook_dict lists all names")
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
        """Run and cache. Each hook point has one entry, under the name that was asked for.

        A filter or None lists TransformerLens's names (`hook_resid_post`, not `hook_out`); hook
        points inside an SAE have the name from `get_sae_hook_name`. An entry can be looked up by
        every name of its point.
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
        # Hooks that stay attached go on writing into this dictionary, so it is not copied.
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
        """Run with hooks `(activation, hook) -> activation | None`. Float32 results are cast."""
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
        """A context manager: the hooks are active inside it, also while generating."""
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
        """Add a hook until `reset_hooks`, at one point or at all points that a filter accepts."""
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
        """Remove hooks, also those inside attached SAEs. The SAEs stay: see `reset_saes`."""
        for wrapper in self._acts_to_saes.values():
            for hook in wrapper.inner_hooks().values():
                hook.remove_hooks(direction, including_permanent=including_permanent, level=level)
                if clear_contexts:
                    hook.clear_context()
        super().reset_hooks(clear_contexts, direction, including_permanent, level)

    def _stop(self, stop_at_layer: int | None) -> int | None:
        """The number of layers to run, from 0 (embeddings only) to all of them.

        A negative `stop_at_layer` counts from the end.
        """
        if stop_at_layer is None:
            return None
        count = len(self.blocks)
        stop = stop_at_layer + count if stop_at_layer < 0 else stop_at_layer
        if not 0 <= stop <= count:
            raise LayerOutOfRange(
                f"stop_at_layer={stop_at_layer}: {describe(self)} has {count} layers"
            )
        return stop

    @contextmanager
    def _stopping(self, stop: int | None) -> Iterator[None]:
        """End this thread's forward passes after `stop` layers.

        The hook raises an exception that upstream catches. Passes of other threads through the same
        layers go on.
        """
        if stop is None:
            yield
            return
        mine = threading.get_ident()

        def before(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == mine:
                raise StopAtLayerException(args[0])

        def after(module: nn.Module, args: Any, output: Any) -> None:
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
    """Wrap a hook so that its result has the dtype of the activation that it was given."""

    @wraps(hook)
    def cast(activation: Any, *args: Any, **kwargs: Any) -> Any:
        result = hook(activation, *args, **kwargs)
        if isinstance(result, Tensor) and result.dtype != activation.dtype:
            return result.to(activation.dtype)
        return result

    return cast


class CachedByName(dict[str, Tensor]):
    """A cache as a dictionary. It lists each tensor once, and finds it by its other names, too."""

    def __init__(self, cached: Mapping[str, Tensor], listed_as: Mapping[str, str]) -> None:
        super().__init__(cached)
        self.listed_as = listed_as  # each name of a hook point -> the name in the dictionary

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(_listed(name, self.listed_as))

    def __missing__(self, name: str) -> Tensor:
        listed = _listed(name, self.listed_as)
        if listed == name or not super().__contains__(listed):
            raise KeyError(name)
        return self[listed]

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor by any name of its hook point, or the default."""
        try:
            return self[name]
        except KeyError:
            return default


def _listed(name: object, listed_as: Mapping[str, str]) -> str:
    """The name under which the tensor of a point, or its gradient, is listed."""
    point = str(name).removesuffix("_grad")
    return listed_as.get(point, point) + str(name)[len(point) :]


class ScopeCache(ActivationCache):
    """TransformerLens's cache for a model with unprocessed weights, so its norms have a gain."""

    def __init__(
        self,
        cached: dict[str, Tensor],
        listed_as: Mapping[str, str],
        model: TransformerBridge,
        has_batch_dim: bool = True,
    ) -> None:
        # The dictionary is not copied: with `reset_hooks_end=False`, later runs write into it.
        super().__init__(cached, model, has_batch_dim=has_batch_dim)
        self.listed_as = listed_as

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict or _listed(name, self.listed_as) in self.cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        try:
            found: Tensor = super().__getitem__(key)
        except KeyError:
            name = key if isinstance(key, str) else get_act_name(*key)
            listed = _listed(name, self.listed_as)
            if listed not in self.cache_dict:
                raise
            found = self.cache_dict[listed]
        return found

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """The contribution of each component to the norm's output, with the norm's gain.

        `[components, ..., d_model] -> [components, ..., d_model]`. The contributions sum up to the
        norm's output. Upstream only divides by the scale, which is right if the gain is folded into
        the weights; the weights of a model for SAEs must not be folded.
        """
        if self._norm(layer, mlp_input) is None:
            raise UnknownHook(
                "the thin adapter has no hooks at norms, so their scales are not in the cache:"
                " load_model(full_hooks=True) has them"
            )
        normed: Tensor = super().apply_ln_to_stack(
            residual_stack,
            layer,
            mlp_input,
            pos_slice,
            batch_slice,
            has_batch_dim,
            recompute_ln,
        )
        if recompute_ln and self._is_final(layer):  # upstream ran the norm, gain included
            return normed
        return normed * self._gain(layer, mlp_input)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Any, neuron_slice: Any, project_2d: Tensor
    ) -> Tensor:
        projected: Tensor = super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, project_2d * self._gain(layer, False)[:, None]
        )
        return projected

    def _is_final(self, layer: int | None) -> bool:
        return layer is None or layer in (-1, self.model.cfg.n_layers)

    def _norm(self, layer: int | None, mlp_input: bool) -> Any:
        if self._is_final(layer):
            return self.model._modules.get("ln_final")
        return self.model.blocks[layer]._modules.get("ln2" if mlp_input else "ln1")

    def _gain(self, layer: int | None, mlp_input: bool) -> Tensor:
        norm = self._norm(layer, mlp_input)
        weight: Tensor = norm.original_component.weight
        # In Qwen3.5, the norms of the residual multiply by 1 + weight.
        return 1.0 + weight if norm.config.rmsnorm_uses_offset else weight
