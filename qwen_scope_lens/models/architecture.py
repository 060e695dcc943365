"""Where the parts of each supported Qwen class are: one table, and functions that look into it.

This is the only module that knows the path of a decoder layer. It looks at modules and
configurations. It never runs or changes a model, and it never opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn

from qwen_scope_lens.errors import LayerOutOfRange, WrongModel
from qwen_scope_lens.families import FAMILIES, SUPPORTED

__all__ = [
    "PLACES",
    "Model",
    "Places",
    "check_layer",
    "context_length",
    "d_model",
    "decoder_layers",
    "describe",
    "input_device",
    "is_quantised",
    "layer_device",
    "part",
    "places_of",
    "places_of_config",
    "text_config",
    "unwrap",
]

Kind = Literal["causal", "text", "wrapper", "wrapped"]

Model: TypeAlias = nn.Module
"""An HF model of a class in `PLACES`, or something around one that `unwrap` takes off: a bridge, a
PEFT wrapper, a compiled module. What a type cannot say, `places_of` checks."""


@dataclass(frozen=True)
class Places:
    """One HF class: its family, and the dotted paths of its parts from the model's root."""

    hf_class: str
    model_type: str  # as in the configuration of such a model
    family: str
    kind: Kind  # with a head (causal, wrapper) or without one (text, wrapped)

    @property
    def root(self) -> str:
        """The path of the text model, which holds the embedding, the layers and the last norm."""
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
        """Whether this is an image-text class around a text model."""
        return self.kind in ("wrapper", "wrapped")

    @property
    def is_hybrid(self) -> bool:
        """Whether three of four layers are linear attention, which is recurrent."""
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


def unwrap(model: Model) -> nn.Module:
    """The plain HF model inside a bridge, a PEFT wrapper or a compiled module.

    LoRA-like adapters are inside the layers, so the inner model still applies them.
    """
    if not isinstance(model, nn.Module):
        raise WrongModel(f"expected a model, found {type(model).__name__}")
    if "original_model" in vars(model):  # a TransformerBridge
        if vars(model).get("compatibility_mode") or vars(model).get("_weights_processed"):
            raise WrongModel(
                "this bridge is in compatibility mode, or has folded or centred weights: its"
                " residuals are not those that the SAEs were trained on. Load it again without that"
            )
        return unwrap(vars(model)["original_model"])
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise WrongModel(
                "a prompt-learning PEFT adapter puts virtual tokens before the text, so positions"
                " would not be those of the text: use a LoRA-like adapter, or merge the adapter"
            )
        return unwrap(cast(Any, model).get_base_model())
    for attribute in ("_orig_mod", "module"):  # of torch.compile and DataParallel
        inner = vars(model).get("_modules", {}).get(attribute)
        if inner is not None:
            return unwrap(inner)
    return model


def places_of(model: Model) -> Places:
    """The row of a model's class, or of the nearest class that it inherits from."""
    inner = unwrap(model)
    for cls in type(inner).__mro__:
        if row := _BY_CLASS.get(cls.__name__):
            return row
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    raise WrongModel(
        f"{type(inner).__name__} (model_type {model_type!r}) is not a supported class: expected"
        f" {SUPPORTED}, as CausalLM, as multimodal wrapper or as a base model of these"
    )


def places_of_config(config: Any) -> Places:
    """The first row for a configuration. It tells a checkpoint's family before weights are read."""
    model_type = getattr(config, "model_type", None)
    for row in PLACES:
        if row.model_type == model_type:
            return row
    raise WrongModel(f"model_type {model_type!r} is another family: this package reads {SUPPORTED}")


def part(model: Model, path: str) -> nn.Module:
    """The module at a dotted path of the unwrapped model."""
    found: nn.Module = reduce(getattr, path.split("."), unwrap(model))
    return found


def decoder_layers(model: Model) -> nn.ModuleList:
    """The decoder layers in order. The output of `decoder_layers(model)[n]` is the residual
    stream after layer n."""
    layers = part(model, places_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def text_config(model_or_config: Model | Any) -> Any:
    """The configuration of the text model, also inside a multimodal one."""
    config = getattr(model_or_config, "config", None)
    if config is None:
        config = model_or_config
    elif isinstance(model_or_config, nn.Module):
        config = unwrap(model_or_config).config
    return getattr(config, "text_config", None) or config


def d_model(model: Model) -> int:
    """The width of the residual stream."""
    return int(text_config(model).hidden_size)


def context_length(model: Model) -> int:
    """The largest number of tokens that a text may have."""
    return int(text_config(model).max_position_embeddings)


def check_layer(model: Model, layer: int) -> int:
    """Return the layer as given, or raise when the model does not have it."""
    count = len(decoder_layers(model))
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise LayerOutOfRange(
            f"layer {layer!r} is not in {describe(model)}: it has 0..{count - 1}"
            " (counted from 0; loaded with `up_to_layer`, a model ends there)"
        )
    return layer


def describe(model: Model) -> str:
    """The model's name, or the name of its class if it has none."""
    inner = unwrap(model)
    name = getattr(getattr(inner, "config", None), "_name_or_path", "")
    return str(name or type(inner).__name__)


def is_quantised(model: Model) -> bool:
    """Whether HF marks the weights as quantised."""
    inner = unwrap(model)
    return bool(
        getattr(inner, "is_quantized", False)
        or getattr(getattr(inner, "config", None), "quantization_config", None)
    )


def input_device(model: Model) -> torch.device:
    """The device for token ids. With offloaded weights it can differ from that of the weights."""
    embed = part(model, places_of(model).embed)
    while isinstance(inner := getattr(embed, "original_component", None), nn.Module):
        embed = inner  # HF's own embedding inside that of a bridge
    return _runs_on(embed) or next(embed.parameters()).device


def layer_device(model: Model, layer: int) -> torch.device:
    """The device on which a decoder layer runs, where a `device_map` can differ for each layer."""
    module = decoder_layers(model)[layer]
    if (device := _runs_on(module)) is not None:
        return device
    first = next(module.parameters(), None)
    return input_device(model) if first is None or first.is_meta else first.device


def _runs_on(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module, whose weights may be elsewhere; None without accelerate."""
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if execution is None:
        return None
    return torch.device(f"cuda:{execution}" if isinstance(execution, int) else execution)
