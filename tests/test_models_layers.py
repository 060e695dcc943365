"""The table of places: every class, the real models on the meta device, and what is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import CLASSES, N_LAYERS, make_config, make_model
from torch import nn

from qwen_scope_lens.catalog import BACKBONES, GROUPS, Backbone
from qwen_scope_lens.errors import LayerOutOfRange, WrongModel
from qwen_scope_lens.families import FAMILIES, SUPPORTED
from qwen_scope_lens.models import architecture as layers
from qwen_scope_lens.models import load_model


@pytest.mark.parametrize("kind", CLASSES)
def test_layers_of_every_class(kind: str) -> None:
    model = make_model(kind)
    found = layers.decoder_layers(model)
    assert len(found) == N_LAYERS
    assert all(type(layer).__name__.endswith("DecoderLayer") for layer in found)
    base = model.model  # what AutoModel loads
    assert layers.decoder_layers(base) is found
    assert layers.places_of(base).head is None
    assert layers.part(model, layers.places_of(model).norm) is not None
    assert layers.d_model(model) == 32
    assert layers.context_length(model) == 256


def test_every_row_is_a_class_of_transformers() -> None:
    for row in layers.PLACES:
        config = getattr(transformers, row.hf_class).config_class
        assert config.model_type == row.model_type, row.hf_class


def test_a_family_is_a_row_and_a_tiny_model() -> None:
    """A new family needs a class for the parity tests, and nothing else."""
    tiny = {row.family for row in layers.PLACES if row.hf_class in CLASSES}
    assert tiny == FAMILIES.keys()
    assert {backbone.family for backbone in BACKBONES} <= FAMILIES.keys()
    for title in ("Qwen2.5", "Qwen3", "Qwen3.6"):
        assert title in SUPPORTED


@pytest.mark.parametrize("kind", CLASSES[:3])
def test_a_lora_model_is_unwrapped(kind: str) -> None:
    model = make_model(kind)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert layers.unwrap(wrapped) is model
    assert len(layers.decoder_layers(wrapped)) == N_LAYERS


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(make_model(), config)
    with pytest.raises(WrongModel, match="virtual tokens"):
        layers.decoder_layers(wrapped)


def test_another_family_is_refused() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    with pytest.raises(WrongModel, match=r"gpt2.*Qwen3"):
        layers.decoder_layers(transformers.GPT2LMHeadModel(config))
    with pytest.raises(WrongModel, match="another family"):
        layers.places_of_config(config)
    with pytest.raises(WrongModel, match="expected a model, found str"):
        layers.unwrap("Qwen/Qwen3-8B-Base")  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [-1, N_LAYERS, True, "1"])
def test_a_layer_out_of_range(layer: Any) -> None:
    with pytest.raises(LayerOutOfRange, match=r"0\.\.3"):
        layers.check_layer(make_model(), layer)


def test_a_subclass_finds_its_row() -> None:
    class Mine(transformers.Qwen3ForCausalLM):
        pass

    assert layers.places_of(Mine(make_config("Qwen3ForCausalLM"))).hf_class == "Qwen3ForCausalLM"


# Facts of the published configurations that the catalog does not have.
REAL: dict[str, dict[str, Any]] = {
    "qwen3-1.7b-base": {"intermediate_size": 6144, "num_attention_heads": 16},
    "qwen3-8b-base": {"intermediate_size": 12288, "num_attention_heads": 32},
    "qwen3-30b-a3b-base": {"num_attention_heads": 32, "num_experts": 128},
    "qwen3.5-2b-base": {"intermediate_size": 6144, "num_attention_heads": 8},
    "qwen3.5-9b-base": {"intermediate_size": 12288, "num_attention_heads": 16},
    "qwen3.5-27b": {"intermediate_size": 17408, "num_attention_heads": 24},
    "qwen3.5-35b-a3b-base": {"num_attention_heads": 16, "num_experts": 256},
}


def real_model(backbone: Backbone, wrapper: bool) -> nn.Module:
    """The model from its real configuration, without memory for weights."""
    settings = {
        "num_hidden_layers": backbone.num_layers,
        "hidden_size": backbone.d_model,
        **REAL[backbone.key],
    }
    prefix = "Qwen3_5" if backbone.is_multimodal else "Qwen3"
    prefix += "Moe" if backbone.is_moe else ""
    if not backbone.is_multimodal:
        settings["num_key_value_heads"], settings["head_dim"] = 4 if backbone.is_moe else 8, 128
        config = getattr(transformers, f"{prefix}Config")(**settings)
    elif wrapper:
        config = getattr(transformers, f"{prefix}Config")(text_config=settings)
    else:
        config = getattr(transformers, f"{prefix}TextConfig")(**settings)
    suffix = "ForConditionalGeneration" if wrapper else "ForCausalLM"
    with torch.device("meta"):
        return getattr(transformers, prefix + suffix)(config)


CASES = [(b, False) for b in BACKBONES] + [(b, True) for b in BACKBONES if b.is_multimodal]


@pytest.mark.parametrize(
    ("backbone", "wrapper"), CASES, ids=[f"{b.key}{'-wrapper' * w}" for b, w in CASES]
)
def test_the_seven_backbones_on_the_meta_device(backbone: Backbone, wrapper: bool) -> None:
    model = real_model(backbone, wrapper)
    found = layers.decoder_layers(model)
    assert len(found) == backbone.num_layers
    assert layers.d_model(model) == backbone.d_model
    assert layers.text_config(model).vocab_size == (248320 if backbone.is_multimodal else 151936)
    kinds = ["linear" if hasattr(layer, "linear_attn") else "full" for layer in found]
    pattern = ["linear"] * 3 + ["full"] if backbone.is_multimodal else ["full"]
    assert kinds == pattern * (backbone.num_layers // len(pattern))

    group = next(g for g in GROUPS if g.backbone == backbone)
    bridge = load_model(model)
    assert bridge.cfg.n_layers == backbone.num_layers
    assert bridge.cfg.d_model == backbone.d_model
    for layer in group.layers:
        assert group.hook_name(layer) in bridge.hook_dict
    last = group.layers[-1]
    path = group.hf_hook_name(last, multimodal=wrapper)
    assert bridge.release().get_submodule(path) is found[last]
