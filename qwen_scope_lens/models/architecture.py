"""Where the parts of every supported Qwen class live: one table, and the questions it answers.

This is the only module that knows the path of a decoder layer. It looks at modules and
configurations; it never runs a model, never changes one and never opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import nn

from qwen_scope_lens.errors import LayerOutOfRange, WrongModel
from qwen_scope_lens.families import FAMILIES, SUPPORTED

__all__ = [
    "PLACES",
    "Places",
    "check_layer",
    "context_length",
    "d_model",
    "decoder_layers",
    "describe",
    "input_device",
    "is_quantised",
    "part",
    "places_of",
    "places_of_config",
    "text_config",
    "unwrap",
]

Kind = Literal["causal", "text", "wrapper", "wrapped"]


@dataclass(frozen=True)
class Places:
    """One HF class: its family and the dotted paths of its parts, from the model's root."""

    hf_class: str
    model_type: str  # of the configuration that such an object carries
    family: str
    kind: Kind  # with a head (causal, wrapper) or without one (text, wrapped)

    @property
    def root(self) -> str:
        """The path of the text model: it holds the embedding, the layers and the last norm."""
        return {
            "causal": "model.",
            "text": "",
            "wrapper": "model.language_model.",
            "wrapped": "language_model.",
        }[self.kind]

    @property
    def embed(self) -> str:
        return f"{self.root}embed_tokens"

    @property
    def layers(self) -> str:
        return f"{self.root}layers"

    @property
    def norm(self) -> str:
        return f"{self.root}norm"

    @property
    def head(self) -> str | None:
        """The unembedding, or None for a class that ends with the last norm."""
        return "lm_head" if self.kind in ("causal", "wrapper") else None

    @property
    def is_multimodal(self) -> bool:
        return self.kind in ("wrapper", "wrapped")

    @property
    def is_hybrid(self) -> bool:
        """Whether three layers of four are linear attention (recurrent)."""
        return FAMILIES[self.family].is_hybrid


def _rows() -> Iterator[Places]:
    for row in FAMILIES.values():
        if not row.is_hybrid:
            yield Places(f"{row.prefix}ForCausalLM", row.name, row.name, "causal")
            yield Places(f"{row.prefix}Model", row.name, row.name, "text")
            continue
        yield Places(f"{row.prefix}ForCausalLM", f"{row.name}_text", row.name, "causal")
        yield Places(f"{row.prefix}TextModel", f"{row.name}_text", row.name, "text")
        yield Places(f"{row.prefix}ForConditionalGeneration", row.name, row.name, "wrapper")
        yield Places(f"{row.prefix}Model", row.name, row.name, "wrapped")


PLACES: tuple[Places, ...] = tuple(_rows())

_BY_CLASS = {row.hf_class: row for row in PLACES}


def unwrap(model: Any) -> nn.Module:
    """The plain HF model inside a bridge, a PEFT wrapper or a compiled module.

    LoRA-like adapters live inside the layers, so the inner model still runs them.
    """
    if not isinstance(model, nn.Module):
        raise WrongModel(f"expected a model, found {type(model).__name__}")
    if "original_model" in vars(model):  # a TransformerBridge
        if vars(model).get("compatibility_mode") or vars(model).get("_weights_processed"):
            raise WrongModel(
                "this bridge is in compatibility mode or has folded or centred weights: its"
                " residuals are not those that the SAEs were trained on. Load it again without"
            )
        return unwrap(vars(model)["original_model"])
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise WrongModel(
                "a prompt-learning PEFT adapter puts virtual tokens before the text, so positions"
                " would not be those of the text: use a LoRA-like adapter or merge it"
            )
        base: Any = model
        return unwrap(base.get_base_model())
    for attribute in ("_orig_mod", "module"):  # torch.compile, DataParallel
        inner = vars(model).get("_modules", {}).get(attribute)
        if inner is not None:
            return unwrap(inner)
    return model


def places_of(model: Any) -> Places:
    """The row of a model's class (or of the nearest class that it inherits from)."""
    inner = unwrap(model)
    for cls in type(inner).__mro__:
        if row := _BY_CLASS.get(cls.__name__):
            return row
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    raise WrongModel(
        f"{type(inner).__name__} (model_type {model_type!r}) is none of the supported classes:"
        f" {SUPPORTED}, as CausalLM, as multimodal wrapper or as their base models"
    )


def places_of_config(config: Any) -> Places:
    """The first row for a configuration: what a checkpoint holds, before any weight is read."""
    model_type = getattr(config, "model_type", None)
    for row in PLACES:
        if row.model_type == model_type:
            return row
    raise WrongModel(f"model_type {model_type!r} is another family: this package reads {SUPPORTED}")


def part(model: Any, path: str) -> nn.Module:
    """The module at a dotted path of the unwrapped model."""
    found: nn.Module = reduce(getattr, path.split("."), unwrap(model))
    return found


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers in order; `decoder_layers(model)[n]` returns the residual after n."""
    layers = part(model, places_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text model, also inside a multimodal one."""
    config = getattr(model_or_config, "config", None)
    if config is None:
        config = model_or_config
    elif isinstance(model_or_config, nn.Module):
        config = unwrap(model_or_config).config
    return getattr(config, "text_config", None) or config


def d_model(model: Any) -> int:
    return int(text_config(model).hidden_size)


def context_length(model: Any) -> int:
    """The most tokens that one text may have."""
    return int(text_config(model).max_position_embeddings)


def check_layer(model: Any, layer: int) -> int:
    """The layer as given; raises for one that the model does not have."""
    count = len(decoder_layers(model))
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise LayerOutOfRange(
            f"layer {layer!r} is not in {describe(model)}: it has 0..{count - 1}"
            " (counted from 0; loaded with `up_to_layer`, a model ends there)"
        )
    return layer


def describe(model: Any) -> str:
    """The model's name where it has one, else its class."""
    inner = unwrap(model)
    name = getattr(getattr(inner, "config", None), "_name_or_path", "")
    return str(name or type(inner).__name__)


def is_quantised(model: Any) -> bool:
    """Whether HF says that the weights are stored in a quantised form."""
    inner = unwrap(model)
    return bool(
        getattr(inner, "is_quantized", False)
        or getattr(getattr(inner, "config", None), "quantization_config", None)
    )


def input_device(model: Any) -> torch.device:
    """Where token ids have to be, also when the weights are offloaded to another place."""
    embed: Any = part(model, places_of(model).embed)
    while hasattr(embed, "original_component"):  # of a bridge
        embed = embed.original_component
    hook = getattr(embed, "_hf_hook", None)  # accelerate's
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution if not isinstance(execution, int) else f"cuda:{execution}")
    return next(embed.parameters()).device
