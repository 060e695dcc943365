"""`load_model` makes a bridge with hook points from a checkpoint or from an HF model in memory.

`open.py` reads checkpoints. The methods of a bridge are in `bridge.py`; which modules it wraps is
said in `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.adapters import prepare_full, register_adapters, residual_name
from qwen_scope_lens.models.architecture import (
    Model,
    describe,
    input_device,
    places_of,
    unwrap,
)
from qwen_scope_lens.models.bridge import RepairedBridge
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.open import open_model

__all__ = ["ScopeBridge", "load_model"]


class ScopeBridge(RepairedBridge):
    """A Qwen model with TransformerLens hook points, made by `load_model`."""

    @classmethod
    def boot_transformers(cls, model_name: str, **kwargs: Any) -> ScopeBridge:
        """`load_model` under the name that SAELens's examples use."""
        return load_model(model_name, **kwargs)


def load_model(
    name_or_model: str | Path | Model,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    up_to_layer: int | None = None,
    full_hooks: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    **hf_options: Any,
) -> ScopeBridge:
    """Load a Qwen model of a family in `families.py`, with TransformerLens hook points.

    `name_or_model` is a hub name, a folder, a model that comes with the package (`mini-qwen3`), or
    an HF model in memory: plain, quantised, spread over devices, or with a LoRA-like adapter. The
    bridge owns a model from memory until `release()`.

    By default, the hook points are those of the residual stream, around HF's own layers.
    `full_hooks` uses TransformerLens's complete adapter instead. It has all hook points, but
    attention is eager and slower.

    `up_to_layer=L` reads layers 0..L of a checkpoint and no later weights, so the model has
    residuals and no logits. The dtype is that of the checkpoint unless `dtype` is given. All
    `hf_options` go to `from_pretrained`.
    """
    if isinstance(name_or_model, ScopeBridge):
        return name_or_model
    if isinstance(name_or_model, TransformerBridge):
        raise WrongModel("this is a bridge already: use it as it is, or load the model again")
    if isinstance(name_or_model, nn.Module):
        given = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "up_to_layer": up_to_layer,
            "revision": revision,
            **hf_options,
        }
        if named := [name for name, value in given.items() if value is not None]:
            raise WrongModel(
                f"{', '.join(named)}: only for loading by name; a model in memory is taken as it is"
            )
        return _bridge(name_or_model, tokenizer, full_hooks)
    if full_hooks and up_to_layer is not None:
        raise WrongModel("with up_to_layer there are residual hooks only: leave full_hooks out")
    model = open_model(
        name_or_model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        up_to_layer=up_to_layer,
        revision=revision,
        local_files_only=local_files_only,
        **hf_options,
    )
    bridge = _bridge(model, vars(model)["_tokenizer"], full_hooks)
    bridge.up_to_layer = up_to_layer
    return bridge


def _bridge(model: Model, tokenizer: Tokenizer | None, full_hooks: bool) -> ScopeBridge:
    """Wrap an HF model, with the thin or the full adapter."""
    inner = unwrap(model)
    places = places_of(inner)
    if any(isinstance(module, GeneralizedComponent) for module in inner.modules()):
        raise WrongModel(
            f"{describe(inner)} is inside a bridge already: use that bridge, or release() it"
        )
    undo: list[Callable[[], None]] = []
    if full_hooks:
        architecture = places.hf_class
        undo = prepare_full(inner, places)
    else:
        register_adapters()
        architecture = residual_name(places.hf_class)
    dtype = next(inner.parameters()).dtype
    cfg = build_bridge_config_from_hf(inner.config, architecture, describe(inner), dtype)
    cfg.rmsnorm_uses_offset = places.is_hybrid  # Qwen3.5's norms multiply by 1 + weight
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    adapter.cfg.device = str(input_device(inner))
    spread: dict[str, Any] = getattr(inner, "hf_device_map", None) or {"": 0}
    adapter.cfg.n_devices = len(set(spread.values()))
    adapter.prepare_model(inner)
    bridge = ScopeBridge(inner, adapter, tokenizer)
    bridge.__dict__["_undo"] = undo
    return bridge
