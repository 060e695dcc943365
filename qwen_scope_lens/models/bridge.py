"""RepairedBridge: SAELens's SAETransformerBridge, with its silent failures repaired or refused.

Texts keep their tokens (no BOS is put before them), generation stops at all of the model's end
tokens, a state dict is whole or refused, and the HF model can be taken out again. `hook_names.py`
checks names, `attached_saes.py` attaches SAEs, `load.py` builds a bridge, and `adapters.py` says
which modules are wrapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.component_setup import refresh_container_state_owners
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from qwen_scope_lens.errors import BadText, WrongModel, WrongState, WrongTokenizer
from qwen_scope_lens.models.adapters import ResidualAdapter
from qwen_scope_lens.models.architecture import describe
from qwen_scope_lens.models.attached_saes import AttachesSAEs
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.models.tokenize import check_tokenizer

__all__ = ["RepairedBridge"]


class RepairedBridge(AttachesSAEs):
    """A Qwen model with TransformerLens hook points, to which SAEs can be attached.

    `blocks.L.hook_resid_post` is the unprocessed output of decoder layer L. The bridge owns the HF
    model from which it was made, until `release()`.
    """

    up_to_layer: int | None = None  # the last layer that was loaded, if not all were

    @torch.compiler.disable
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        *args: Any,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model. `stop_at_layer=n` runs layers 0..n-1 and returns the residual `[b, p, d]`.

        A list of texts is padded and masked. No cache is built unless `past_key_values` or
        `use_cache` asks for one. A compiled bridge or model runs eagerly, so that hooks act.
        """
        if "_released" in self.__dict__:
            raise WrongModel("this bridge gave its model back: make a new one with load_model()")
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
        elif _is_text(input):
            input = self._run_tokens(input, kwargs.pop("padding_side", None))
        if not getattr(self, "_capture_hf_cache", False) and return_type != "logits_and_cache":
            asks = ("use_cache", "use_past_kv_cache", "past_key_values")
            if not any(name in kwargs for name in asks):
                kwargs["use_cache"] = False
        with eagerly(), self._stopping(stop):
            return super().forward(input, return_type, *args, **kwargs)

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue a text, up to any end token in the model's generation settings."""
        eos_token_id = self._ends(stop_at_eos, eos_token_id)
        if isinstance(input, list) and len(input) > 1 and "attention_mask" not in kwargs:
            input, kwargs["attention_mask"] = self._tokens_and_mask(input, "left")
            if kwargs.get("return_type", "input") == "input":
                kwargs["return_type"] = "str"
        elif _is_text(input):
            self._run_tokens(input)  # refuses a text that is too long; upstream would cut it
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
        """As `generate`, but yield the text in pieces."""
        eos_token_id = self._ends(stop_at_eos, eos_token_id)
        if _is_text(input):
            self._run_tokens(input)
        return super().generate_stream(
            input, max_new_tokens, max_tokens_per_yield, stop_at_eos, eos_token_id, **kwargs
        )

    def hf_generate(self, *args: Any, **kwargs: Any) -> Any:
        """The HF model's own `generate`. It runs eagerly, so that hooks act."""
        with eagerly():
            return super().hf_generate(*args, **kwargs)

    def end_tokens(self) -> list[int]:
        """The ids of the model's end tokens. A chat model has several."""
        for holder in ("generation_config", "config"):
            found = getattr(getattr(self.original_model, holder, None), "eos_token_id", None)
            if found is not None:
                return [found] if isinstance(found, int) else list(found)
        return []

    def _ends(
        self, stop_at_eos: bool, given: int | Sequence[int] | None
    ) -> int | Sequence[int] | None:
        """The end tokens for a generation. Raises for a model that cannot generate."""
        if "unembed" not in self._modules:
            raise WrongModel(f"{describe(self)} has no unembedding here, so it cannot generate")
        return (self.end_tokens() or None) if stop_at_eos and given is None else given

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as it was given, or None. No BOS token is made up for it."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Tokenizer | None) -> None:
        if value is not None:
            check_tokenizer(value, self)
            self.cfg.tokenizer_prepends_bos = False
            self.cfg.tokenizer_appends_eos = False
        self._tokenizer = value

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> Tensor:
        """Token ids `[batch, pos]`. `prepend_bos` has no effect, because Qwen has no BOS token.

        Upstream would put `<|endoftext|>` first. As upstream, a text longer than the context is cut
        to its beginning, with a warning unless `truncate=True` asks for it; `truncate=False`
        returns all its tokens. A run never cuts a text.
        """
        texts = [input] if isinstance(input, str) else input
        if self._tokenizer is None:
            raise WrongTokenizer("this bridge has no tokenizer: pass one to load_model()")
        if not texts or not all(texts):
            raise BadText("an empty text has no tokens: there is nothing to run")
        limit = self.cfg.n_ctx
        if truncate is None:
            longest = max(self._token_counts(texts))
            if longest > limit:
                warnings.warn(
                    f"the text has {longest} tokens, the context {limit}: to_tokens() keeps the"
                    " beginning; pass truncate=False for all of them, True to be silent",
                    stacklevel=2,
                )
        cut = truncate is not False
        return super().to_tokens(texts, False, padding_side, move_to_device, cut)

    def _token_counts(self, texts: list[str]) -> list[int]:
        assert self._tokenizer is not None  # `to_tokens` has refused a bridge without one
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _run_tokens(self, texts: str | list[str], side: str | None = None) -> Tensor:
        """The tokens of texts for a run. Refuses a text longer than the context."""
        tokens = self.to_tokens(texts, padding_side=side, truncate=False)
        if tokens.shape[-1] > self.cfg.n_ctx:
            raise BadText(
                f"the text has {tokens.shape[-1]} tokens, the context {self.cfg.n_ctx}: run"
                " to_tokens(text, truncate=True) to keep the beginning"
            )
        return tokens

    def _tokens_and_mask(self, texts: list[str], side: str | None) -> tuple[Tensor, Tensor]:
        side = side or getattr(self._tokenizer, "padding_side", "right")
        tokens = self._run_tokens(texts, side)
        lengths = torch.tensor(self._token_counts(texts), device=tokens.device)[:, None]
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if side == "left":
            return tokens, (positions >= tokens.shape[-1] - lengths).long()
        return tokens, (positions < lengths).long()

    def state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Every tensor of the model, by HF's names, or with `full_hooks` by TransformerLens's.

        It is refused where it would lack tensors: for offloaded weights, and inside another module.
        """
        if destination is not None or prefix:
            check_nested(self, super().state_dict(destination={}, prefix="m.", keep_vars=True))
            nested: dict[str, Any] = super().state_dict(destination, prefix, keep_vars)
            return nested
        state = whole_state(self, upstream_names=self.is_full)
        return state if keep_vars else {name: t.detach() for name, t in state.items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict of this bridge or of an HF model. With `strict` it must be complete."""
        lists = load_whole(
            self, state_dict, strict=strict, assign=assign, upstream_names=self.is_full
        )
        return _IncompatibleKeys(*lists)

    @property
    def is_full(self) -> bool:
        return not isinstance(self.adapter, ResidualAdapter)

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it folds and centres weights, but SAEs read the unprocessed residual."""
        raise WrongModel(
            "compatibility mode rewrites the weights and shifts the residuals (by 2e-2 to 1.6e-1 in"
            " bfloat16), but SAEs read unprocessed residuals. The hook names work without it"
        )

    def process_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, for the same reason as `enable_compatibility_mode`."""
        self.enable_compatibility_mode()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the bridge's modules are inside the HF model, so its files would not load."""
        raise WrongModel("call release() first: it gives the HF model back, which can be saved")

    def release(self) -> nn.Module:
        """Give the HF model back as it was. The bridge cannot be used afterwards."""
        self.reset_saes()
        self.reset_hooks(including_permanent=True)
        model: nn.Module = self.original_model
        for undo in self.__dict__.pop("_undo", []):
            undo()
        _unbridge(model)
        self.__dict__["_released"] = True
        return model


def _is_text(input: Any) -> bool:
    return isinstance(input, str) or (
        isinstance(input, list) and all(isinstance(text, str) for text in input)
    )


def _unbridge(module: nn.Module) -> None:
    """Put the HF modules back in place of a bridge's components."""
    for name, child in list(module._modules.items()):
        while isinstance(child, GeneralizedComponent):
            child = child._modules.get("_original_component")
        if child is not None:
            module._modules[name] = child
            _unbridge(child)


def whole_state(bridge: TransformerBridge, *, upstream_names: bool) -> dict[str, Tensor]:
    """Every tensor of the HF model by name. Shared tensors have each of HF's names.

    Upstream names only the modules that its adapter wraps. Here every tensor has a name: with
    `upstream_names` upstream's if it has one, else HF's own, which an HF model can load, too.
    """
    model = bridge.original_model
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise WrongModel(
            f"weights of {describe(bridge)} are offloaded, so a state dict would lack them: load"
            " the model without offloading, or save it with HF's own save_pretrained() after"
            " release()"
        )
    state: dict[str, Tensor] = {}
    if upstream_names:
        state |= TransformerBridge.state_dict(bridge, keep_vars=True)
    covered = {id(tensor) for tensor in state.values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in covered:
            state.setdefault(_plain(name), tensor)
    return state


def load_whole(
    bridge: TransformerBridge,
    given: Mapping[str, Any],
    *,
    strict: bool,
    assign: bool,
    upstream_names: bool,
) -> tuple[list[str], list[str]]:
    """Write a state dict into the HF model, and return the missing and the unexpected names.

    A tensor may have the bridge's name, HF's name or upstream's name. With `strict`, both lists
    must be empty; otherwise `WrongState` is raised and nothing is written.
    """
    model = bridge.original_model
    paths: dict[int, list[str]] = {}  # a tensor -> its places in the HF model
    known: dict[str, int] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        paths.setdefault(id(tensor), []).append(path)
        known[path] = known[_plain(path)] = id(tensor)
    for name, found in bridge._tl_key_to_actual_keys().items():
        known.setdefault(name, known[found[0]])
    own = whole_state(bridge, upstream_names=upstream_names)

    unexpected = [name for name in given if name not in known]
    arrived = {known[name] for name in given if name in known}
    missing = [name for name, tensor in own.items() if id(tensor) not in arrived]
    if strict and (missing or unexpected):
        raise WrongState(
            f"the state dict does not fit {describe(bridge)}: {len(missing)} of {len(own)} tensors"
            f" are missing{_first(missing)}, {len(unexpected)} are not known here"
            f"{_first(unexpected)}. Nothing was loaded; strict=False loads what fits"
        )
    wanted = {p: given[name] for name in given if name in known for p in paths[known[name]]}
    model.load_state_dict(wanted, strict=False, assign=assign)
    if assign:  # upstream's components have their own references to some parameters
        refresh_container_state_owners(bridge)
    return missing, unexpected


def check_nested(bridge: TransformerBridge, nested: Mapping[str, Any]) -> None:
    """Refuse a state dict of a module around the bridge if it lacks tensors of the model."""
    have = {id(tensor) for tensor in nested.values()}
    model = bridge.original_model.state_dict(keep_vars=True)
    if lacking := [_plain(name) for name, tensor in model.items() if id(tensor) not in have]:
        raise WrongModel(
            f"the state dict of a module that holds this bridge would lack {len(lacking)} of its"
            f" tensors{_first(lacking)}: call state_dict() on the bridge itself"
        )


def _plain(path: str) -> str:
    """HF's own name of a tensor, without the bridge's components in the path."""
    return path.replace("_original_component.", "")


def _first(names: list[str]) -> str:
    return f" (the first is {names[0]})" if names else ""
