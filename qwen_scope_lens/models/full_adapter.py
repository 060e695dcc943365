"""What an HF model needs before TransformerLens's full adapter may wrap it.

The full adapter rebuilds attention in eager mode and wraps norms and projections. Here its known
defects on Qwen are made up for, or the model is refused; every change comes with its undoing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import Places

__all__ = ["prepare_full"]


def prepare_full(model: Any, places: Places) -> list[Callable[[], None]]:
    """Make a model ready for the full adapter; returns what has to be called to undo it."""
    if places.kind != "causal":
        raise WrongModel(
            f"full_hooks takes a CausalLM, not {places.hf_class}: TransformerLens's multimodal"
            " adapter needs torchvision, its others a head. Load by name (the text model has the"
            " same weights), or leave full_hooks out: the thin adapter takes this class as it is"
        )
    if any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules()):
        raise WrongModel(
            "full_hooks reads weights that are offloaded to CPU or disk, and fails or gives"
            " garbage: leave full_hooks out, the thin adapter works with offloading"
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
    """Give back two attributes that transformers moved to module level and the adapter reads.

    Without them the adapter crashes whenever no cache is in use.
    """
    source = sys.modules[type(linear_attention).__module__]
    undo: list[Callable[[], None]] = []
    wanted = {
        "causal_conv1d_fn": None,  # None: the adapter convolves by the module's own conv1d
        "chunk_gated_delta_rule": getattr(source, "torch_chunk_gated_delta_rule", None),
    }
    for name, value in wanted.items():
        if not hasattr(linear_attention, name):
            setattr(linear_attention, name, value)
            undo.append(lambda name=name: delattr(linear_attention, name))  # type: ignore[misc]
    return undo
