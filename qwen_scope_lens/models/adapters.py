"""Which modules of an HF model a bridge wraps: a few (our thin adapter) or all (TransformerLens's).

The thin adapter wraps only the embedding, the decoder layers and the unembedding. Attention, linear
attention and experts run HF's own kernels, and the hook points are those that a residual SAE needs:
`hook_embed`, `blocks.L.hook_resid_pre`, `blocks.L.hook_resid_post`. Norms are not wrapped, so no
hook on a norm could give wrong values.

TransformerLens's full adapter rebuilds attention in eager mode and also wraps norms and
projections. `prepare_full` makes up for its known defects on Qwen, or refuses the model. Every
change that it makes comes with a function that undoes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import PLACES, Places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ResidualAdapter",
    "ResidualBlock",
    "prepare_full",
    "register_adapters",
    "residual_name",
]

SUFFIX = "/residual"
_BY_NAME = {row.hf_class + SUFFIX: row for row in PLACES}


def residual_name(hf_class: str) -> str:
    """The name under which the thin adapter of an HF class is registered."""
    return hf_class + SUFFIX


def register_adapters() -> None:
    """Register the thin adapters with TransformerLens, under names of our own.

    No name of TransformerLens is replaced, and a second call changes nothing.
    """
    for name in _BY_NAME:
        ArchitectureAdapterFactory.register_adapter(name, ResidualAdapter)


class ResidualAdapter(ArchitectureAdapter):
    """Maps the embedding, the layers and the unembedding of any supported class, and no more."""

    applicable_phases: list[int] = []  # noqa: RUF012 (upstream's declaration)
    supports_compatibility_mode = False
    supports_hf_output_attentions = False  # asking for them would switch HF to eager attention
    supports_fold_ln = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        places = _BY_NAME[cfg.architecture]
        self._set_rms_rotary_defaults()
        cfg.default_prepend_bos = False
        cfg.is_multimodal = places.is_multimodal
        self.weight_processing_conversions: dict[str, Any] = {}
        self.component_mapping = {
            "embed": Embedding(name=places.embed),
            "blocks": ResidualBlock(name=places.layers),
        }
        if places.head is not None:
            self.component_mapping["unembed"] = Unembedding(name=places.head)


class Embedding(EmbeddingBridge):
    """The token embedding with its hooks. A quantised one keeps its output dtype."""

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids `[batch, pos]` -> `[batch, pos, d_model]`."""
        embedded = self._modules["_original_component"](self.hook_in(input_ids), *args, **kwargs)
        return same_dtype(self.hook_out(embedded), embedded)


class Unembedding(UnembeddingBridge):
    """The unembedding with its hooks. Unlike upstream's, it adds no bias to the HF module."""

    def set_original_component(self, original_component: nn.Module) -> None:
        GeneralizedComponent.set_original_component(self, original_component)


class ResidualBlock(GeneralizedComponent):
    """A decoder layer between its two residual hooks."""

    is_list_item = True
    hook_out_is_single_residual_stream = True
    hook_aliases = {  # noqa: RUF012
        "hook_resid_pre": "hook_in",
        "hook_resid_post": "hook_out",
    }

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[batch, pos, d_model] -> [batch, pos, d_model]`, with HF's other results passed on."""
        entering = same_dtype(self.hook_in(hidden_states), hidden_states)
        output = self._modules["_original_component"](entering, *args, **kwargs)
        if isinstance(output, tuple):
            return (same_dtype(self.hook_out(output[0]), output[0]), *output[1:])
        return same_dtype(self.hook_out(output), output)


def same_dtype(hooked: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """A hook's result in the residual's dtype, so that a hook may compute in float32."""
    return hooked if hooked.dtype == before.dtype else hooked.to(before.dtype)


def prepare_full(model: PreTrainedModel, places: Places) -> list[Callable[[], None]]:
    """Make a model ready for the full adapter. Returns the functions that undo the changes."""
    if places.kind != "causal":
        raise WrongModel(
            f"full_hooks takes a CausalLM, not {places.hf_class}: TransformerLens's multimodal"
            " adapter needs torchvision, its others a head. Load by name (the text model has the"
            " same weights), or leave full_hooks out: the thin adapter takes this class as it is"
        )
    if any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules()):
        raise WrongModel(
            "full_hooks would read weights that are offloaded to CPU or disk, and fail or give"
            " wrong values: leave full_hooks out, the thin adapter works with offloading"
        )
    undo: list[Callable[[], None]] = []
    attention = model.config._attn_implementation
    if attention != "eager":
        model.set_attn_implementation("eager")
        undo.append(lambda: model.set_attn_implementation(attention))
    if getattr(model.lm_head, "bias", None) is None:  # the full adapter adds one of zeros
        undo.append(lambda: setattr(model.lm_head, "bias", None))
    for module in model.modules():
        if hasattr(module, "linear_attn"):
            undo += _restore_kernels(module.linear_attn)
    return undo


def _restore_kernels(linear_attention: nn.Module) -> list[Callable[[], None]]:
    """Set two attributes that the adapter reads, and that transformers has moved to module level.

    Without them the adapter crashes when no cache is used.
    """
    source = sys.modules[type(linear_attention).__module__]
    undo: list[Callable[[], None]] = []
    wanted = {
        "causal_conv1d_fn": None,  # with None, the adapter uses the module's own conv1d
        "chunk_gated_delta_rule": getattr(source, "torch_chunk_gated_delta_rule", None),
    }
    for name, value in wanted.items():
        if not hasattr(linear_attention, name):
            setattr(linear_attention, name, value)
            undo.append(lambda name=name: delattr(linear_attention, name))  # type: ignore[misc]
    return undo
