"""ScopeBridge: SAELens's SAETransformerBridge, with its silent failures repaired or refused.

Names are checked before a run, SAEs are attached beside hook points, hooks may compute in float32,
texts keep their tokens (no BOS is ever put first), and the HF model can be had back. Building one
is `load.py`; which modules are wrapped is `adapter.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE
from torch import Tensor, nn
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from qwen_scope_lens.errors import BadText, LayerOutOfRange, UnknownHook, WrongModel, WrongTokenizer
from qwen_scope_lens.models.attach import AttachedSAE
from qwen_scope_lens.models.layers import check_layer, describe
from qwen_scope_lens.models.tokens import check_tokenizer

__all__ = ["ScopeBridge"]

Names = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class ScopeBridge(SAETransformerBridge):  # type: ignore[misc]
    """A Qwen model with TransformerLens hook points, to which SAEs can be attached.

    `blocks.L.hook_resid_post` is the output of decoder layer L, unprocessed. It owns the HF model
    from which it was made, until `release()`.
    """

    up_to_layer: int | None = None  # the last layer loaded, where not all were

    # ---- names -------------------------------------------------------------------------------

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
            # TransformerLens's names first: they are what a point is reported as.
            wanted = sorted(
                (n for n in hooks if names is None or names(n)),
                key=lambda n: n == hooks[n].name,
            )
            if not wanted:
                raise UnknownHook("the filter matches no hook point; hook_dict lists all")
            found: dict[int, tuple[str, HookPoint]] = {}
            for name in wanted:
                found.setdefault(id(hooks[name]), (name, hooks[name]))
            return list(found.values())
        listed = [names] if isinstance(names, str) else list(names)
        return [(self.check_hook(name, stop), hooks[name]) for name in listed]

    # ---- running -----------------------------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        *args: Any,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; `stop_at_layer=n` runs layers 0..n-1 and returns the residual `[b, p, d]`.

        A list of texts is padded with its mask. Without `past_key_values` or `use_cache` no cache
        is built.
        """
        if "_released" in self.__dict__:
            raise WrongModel("this bridge gave its model back: build another with load_model()")
        stop = self._stop(stop_at_layer)
        if stop is None and return_type is not None and "unembed" not in self._modules:
            raise WrongModel(
                f"{describe(self)} has no unembedding here (up_to_layer, or a base model), so there"
                " are no logits: pass return_type=None or stop_at_layer"
            )
        if isinstance(input, list) and len(input) > 1 and kwargs.get("attention_mask") is None:
            input, kwargs["attention_mask"] = self._tokens_and_mask(
                input, kwargs.pop("padding_side", None)
            )
        if not getattr(self, "_capture_hf_cache", False) and return_type != "logits_and_cache":
            asks = ("use_cache", "use_past_kv_cache", "past_key_values")
            if not any(name in kwargs for name in asks):
                kwargs["use_cache"] = False
        with self._stopping(stop):
            return super().forward(input, return_type, *args, **kwargs)

    def run_with_cache(  # type: ignore[override]
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Names = None,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache: one entry for each hook point, under the name that was asked for.

        A filter or None gives TransformerLens's names (`hook_resid_post`, not `hook_out`).
        """
        if "unembed" not in self._modules and stop_at_layer is None:
            kwargs.setdefault("return_type", None)
        stop = self._stop(stop_at_layer)
        wanted = {name for name, _ in self._points(names_filter, stop)}
        with self._stopping(stop):
            output, cache = super().run_with_cache(
                input,
                return_cache_object=False,
                remove_batch_dim=remove_batch_dim,
                names_filter=lambda name: name in wanted,
                **kwargs,
            )
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def run_with_hooks(  # type: ignore[override]
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
            elif self._gated_hook_reason(found) is not None:
                continue
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

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue a text; stops at any end token of the model's generation settings."""
        self._check_generates()
        if stop_at_eos and eos_token_id is None:
            eos_token_id = self.end_tokens() or None
        return super().generate(input, max_new_tokens, stop_at_eos, eos_token_id, **kwargs)

    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `generate`, in pieces."""
        self._check_generates()
        if stop_at_eos and eos_token_id is None:
            eos_token_id = self.end_tokens() or None
        return super().generate_stream(
            input, max_new_tokens, max_tokens_per_yield, stop_at_eos, eos_token_id, **kwargs
        )

    def end_tokens(self) -> list[int]:
        """The ids at which this model ends: a chat model has several."""
        for holder in ("generation_config", "config"):
            found = getattr(getattr(self.original_model, holder, None), "eos_token_id", None)
            if found is not None:
                return [found] if isinstance(found, int) else list(found)
        return []

    def _check_generates(self) -> None:
        if "unembed" not in self._modules:
            raise WrongModel(f"{describe(self)} has no unembedding here: it cannot generate")

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
        """End forward passes after `stop` layers, by way of an exception that upstream catches."""
        if stop is None:
            yield
            return

        def before(module: Any, args: Any) -> NoReturn:
            raise StopAtLayerException(args[0])

        def after(module: Any, args: Any, output: Any) -> NoReturn:
            raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)

        if stop == 0:
            handle = self.blocks[0].register_forward_pre_hook(before)
        else:
            handle = self.blocks[stop - 1].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    # ---- texts -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as it was given: no BOS is invented for it."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        if value is not None:
            check_tokenizer(value, self)
            self.cfg.tokenizer_prepends_bos = False
            self.cfg.tokenizer_appends_eos = False
        self._tokenizer = value

    def to_tokens(  # type: ignore[override]
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Tensor:
        """Token ids `[batch, pos]`. `prepend_bos` has no effect: Qwen has no BOS.

        Upstream would put `<|endoftext|>` first, on a bridge and not on the HF model.
        """
        texts = [input] if isinstance(input, str) else input
        if self._tokenizer is None:
            raise WrongTokenizer("this bridge has no tokenizer: pass one to load_model()")
        if not texts or not all(texts):
            raise BadText("an empty text has no tokens: there is nothing to run")
        tokens = super().to_tokens(texts, False, padding_side, move_to_device, truncate)
        limit = self.cfg.n_ctx
        if tokens.shape[-1] > limit:
            raise BadText(
                f"the text has {tokens.shape[-1]} tokens, the context {limit}: pass truncate=True"
                " to to_tokens() to keep the beginning"
            )
        return tokens

    def _tokens_and_mask(self, texts: list[str], side: str | None) -> tuple[Tensor, Tensor]:
        side = side or getattr(self._tokenizer, "padding_side", "right")
        tokens = self.to_tokens(texts, padding_side=side)
        counts = [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
        lengths = torch.tensor(counts, device=tokens.device)[:, None]
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if side == "left":
            return tokens, (positions >= tokens.shape[-1] - lengths).long()
        return tokens, (positions < lengths).long()

    # ---- SAEs --------------------------------------------------------------------------------

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> None:
        """Attach an SAE at its hook until `reset_saes`; one already there is replaced.

        Hooks at that point see what flows on, the reconstruction; what came in is its
        `hook_sae_input`. With the error term and no edit, what flows on is what came in.
        """
        name = sae.cfg.metadata.hook_name
        out = sae.cfg.metadata.hook_name_out or name
        hooks = {n: self.hook_dict[self.check_hook(n)] for n in (name, out)}
        if "hook_resid" in name and sae.cfg.d_in != self.cfg.d_model:
            raise WrongModel(
                f"the SAE reads d_in={sae.cfg.d_in}, the residual of {describe(self)} has d_model="
                f"{self.cfg.d_model}: it was trained on another model"
                f" ({sae.cfg.metadata.model_name})"
            )
        if getattr(sae, "hook_z_reshaping_mode", False):
            raise WrongModel("SAEs on hook_z are not supported here: use SAELens's own bridge")
        if name in self._acts_to_saes:
            self._reset_sae(name)
        special = None
        if exclude_special_tokens is not False:
            listed = (
                self.tokenizer.all_special_ids
                if exclude_special_tokens is True
                else list(exclude_special_tokens)
            )
            special = torch.tensor(listed, dtype=torch.long)
        error_term = sae.use_error_term if use_error_term is None else use_error_term
        wrapper = AttachedSAE(sae, error_term, special)
        for inner, hook in wrapper.inner_hooks().items():
            hook.name = f"{self._resolve_hook_name(out)}.{inner}"
        wrapper.attach(hooks[out], self.embed, hooks[name] if out != name else None)
        self._acts_to_saes[name] = wrapper

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        """Detach, and put a previous one back."""
        wrapper = self._acts_to_saes.pop(act_name, None)
        if wrapper is not None:
            wrapper.detach()
        if prev_wrapper is not None:
            special = prev_wrapper.special
            self.add_sae(
                prev_wrapper.sae,
                prev_wrapper.use_error_term,
                False if special is None else special.tolist(),
            )

    def reset_saes(self, act_names: str | list[str] | None = None) -> None:
        """Detach all SAEs, or those at the named hooks."""
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in list(self._acts_to_saes) if names is None else names:
            if name not in self._acts_to_saes:
                have = ", ".join(self._acts_to_saes) or "none"
                raise UnknownHook(f"no SAE is attached at {name}; attached: {have}")
            self._reset_sae(name)

    @contextmanager
    def saes(
        self,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[ScopeBridge]:
        """SAEs for the time of a block; those that were there before come back."""
        before = dict(self._acts_to_saes)
        added: list[str] = []
        try:
            for sae in [saes] if isinstance(saes, SAE) else saes:
                self.add_sae(sae, use_error_term, exclude_special_tokens)
                added.append(sae.cfg.metadata.hook_name)
            yield self
        finally:
            if reset_saes_end:
                for name in dict.fromkeys(added):
                    self._reset_sae(name, before.get(name))

    def run_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`forward` with SAEs attached; `use_error_term` and the like as of `saes`."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self(*args, **kwargs)

    def run_with_cache_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`run_with_cache` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`run_with_hooks` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_hooks(*args, **kwargs)

    # ---- refusals, and the way back ----------------------------------------------------------

    @classmethod
    def boot_transformers(cls, model_name: str, **kwargs: Any) -> ScopeBridge:  # type: ignore[override]
        """`load_model` under the name that SAELens's examples use."""
        from qwen_scope_lens.models.load import load_model

        return load_model(model_name, **kwargs)

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it folds and centres weights, SAEs read the unprocessed residual."""
        raise WrongModel(
            "compatibility mode rewrites the weights and shifts the residuals (by 2e-2 to 1.6e-1 in"
            " bfloat16): SAEs read unprocessed ones. The hook names work without it"
        )

    def process_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `enable_compatibility_mode`."""
        self.enable_compatibility_mode()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the bridge's modules stand inside the HF model, its files would not load."""
        raise WrongModel("call release() first: it gives the HF model back, which can be saved")

    def release(self) -> nn.Module:
        """Give the HF model back as it was; the bridge cannot be used any more."""
        self.reset_saes()
        self.reset_hooks(including_permanent=True)
        model: nn.Module = self.original_model
        for undo in self.__dict__.pop("_undo", []):
            undo()
        _unbridge(model)
        self.__dict__["_released"] = True
        return model

    def check_layer(self, layer: int) -> int:
        """The layer as given; raises for one that the model does not have."""
        return check_layer(self, layer)


def _unbridge(module: nn.Module) -> None:
    """Put the HF modules back where a bridge's components stand."""
    for name, child in list(module._modules.items()):
        while isinstance(child, GeneralizedComponent):
            child = child._modules.get("_original_component")
        if child is not None:
            module._modules[name] = child
            _unbridge(child)


def _in_dtype(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, its result in the dtype of what it was given."""

    @wraps(hook)
    def cast(activation: Any, *args: Any, **kwargs: Any) -> Any:
        result = hook(activation, *args, **kwargs)
        if isinstance(result, Tensor) and result.dtype != activation.dtype:
            return result.to(activation.dtype)
        return result

    return cast


def _sae_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what concerns SAEs out of the arguments of a run."""
    names = ("reset_saes_end", "use_error_term", "exclude_special_tokens")
    return {name: kwargs.pop(name) for name in names if name in kwargs}
