"""`load_model`: by name, from memory, first layers only, with adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tiny_models import CLASSES, VOCAB, make_model, make_tokenizer
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

from qwen_scope_lens.errors import (
    CheckpointMissing,
    LayerOutOfRange,
    WrongKeys,
    WrongModel,
    WrongTokenizer,
)
from qwen_scope_lens.models import capture, load_model

IDS = torch.tensor([[72, 101, 108, 108, 111, 33]])
no_grad = torch.no_grad()


@no_grad
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("sharded", [True, False])
def test_up_to_layer_reads_nothing_behind_it(kind: str, sharded: bool, tmp_path: Path) -> None:
    model = make_model(kind, torch.bfloat16)
    truth = capture(model, [IDS[0]], [1]).residuals[1]
    model.save_pretrained(tmp_path, max_shard_size="12KB" if sharded else "1GB")
    make_tokenizer().save_pretrained(tmp_path)
    removed = 0
    if sharded:  # take away every file that holds later layers or the head alone
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        later = ("layers.2.", "layers.3.", "lm_head", "visual")
        needed = {f for key, f in index.items() if not any(part in key for part in later)}
        for file in set(index.values()) - needed:
            (tmp_path / file).unlink()
            removed += 1
        assert removed > 0
    bridge = load_model(tmp_path, up_to_layer=1)
    assert bridge.up_to_layer == 1
    assert len(bridge.blocks) == 2
    assert bridge.cfg.dtype == torch.bfloat16
    assert all(not p.is_meta for p in bridge.parameters())
    torch.testing.assert_close(
        capture(bridge, [IDS[0]], [1]).residuals[1], truth, rtol=2e-2, atol=2e-2
    )
    output, cache = bridge.run_with_cache("Hello!", names_filter="blocks.1.hook_resid_post")
    assert output is None
    assert cache["blocks.1.hook_resid_post"].shape == (1, 6, 32)
    for refused in (lambda: bridge(IDS), lambda: bridge.generate(IDS)):
        with pytest.raises(WrongModel, match="no unembedding"):
            refused()
    with pytest.raises(LayerOutOfRange, match=r"0\.\.1"):
        capture(bridge, [IDS[0]], [2])
    with pytest.raises(LayerOutOfRange, match=r"0\.\.3"):
        load_model(tmp_path, up_to_layer=4)
    with pytest.raises(WrongModel, match="full_hooks"):
        load_model(tmp_path, up_to_layer=1, full_hooks=True)


@no_grad
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_a_device_map_with_disk_offload(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb"), "cpu")
    places |= {"layers.1": "disk", "layers.3": "disk"}
    bridge = load_model(
        tmp_path / "model",
        device_map={"lm_head": "cpu"} | {f"model.{n}": place for n, place in places.items()},
        offload_folder=str(tmp_path / "offload"),
    )
    assert bridge.cfg.n_devices == 2
    torch.testing.assert_close(bridge(IDS), model(IDS).logits, rtol=1e-5, atol=1e-5)
    truth = capture(model, [IDS[0]], [1, 3])
    found = capture(bridge, [IDS[0]], [1, 3])
    for layer in (1, 3):
        torch.testing.assert_close(
            found.residuals[layer], truth.residuals[layer], rtol=1e-5, atol=1e-5
        )


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    for up_to_layer in (None, 1):
        with pytest.raises(WrongKeys, match=r"layers\.1\.mlp\.up_proj"):
            load_model(tmp_path, up_to_layer=up_to_layer)


def test_what_is_not_there_and_what_is_another_family(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="cannot be loaded"):
        load_model(tmp_path / "nowhere", local_files_only=True)
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(WrongModel, match="another family"):
        load_model(tmp_path)


@no_grad
def test_a_bridge_is_saelens_own_kind_and_is_taken_as_it_is() -> None:
    bridge = load_model(make_model())
    assert isinstance(bridge, SAETransformerBridge)
    assert load_model(bridge) is bridge
    stock = make_model()
    stock = build_bridge_from_module(stock, "Qwen3ForCausalLM", hf_config=stock.config)
    with pytest.raises(WrongModel, match="a bridge already"):
        load_model(stock)
    with pytest.raises(WrongModel, match=r"dtype.*for loading by name"):
        load_model(make_model(), dtype=torch.bfloat16)


@no_grad
@pytest.mark.parametrize("kind", CLASSES)
def test_a_base_model_has_residuals_and_no_logits(kind: str) -> None:
    base = make_model(kind).model
    truth = capture(base, [IDS[0]], [2]).residuals[2]
    bridge = load_model(base)
    _, cache = bridge.run_with_cache(IDS, names_filter="blocks.2.hook_resid_post")
    assert torch.equal(cache["blocks.2.hook_resid_post"][0], truth)
    with pytest.raises(WrongModel, match="no unembedding"):
        bridge(IDS)


@no_grad
@pytest.mark.parametrize("full", [False, True])
def test_a_lora_adapter_takes_part(full: bool) -> None:
    model = make_model()
    plain = model(IDS).logits
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    truth = wrapped(IDS).logits
    assert not torch.allclose(truth, plain)
    found = capture(wrapped, [IDS[0]], [1]).residuals[1]
    bridge = load_model(wrapped, full_hooks=full)
    torch.testing.assert_close(bridge(IDS), truth, rtol=1e-4, atol=1e-4)
    _, cache = bridge.run_with_cache(IDS, names_filter="blocks.1.hook_resid_post")
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"][0], found, rtol=1e-4, atol=1e-4)


@no_grad
def test_a_quantised_linear_layer_is_left_as_it_is() -> None:
    """HF puts other Linear classes in; the thin adapter neither casts nor reads weights."""

    class Int8Linear(torch.nn.Module):
        scale: float
        weight: torch.Tensor

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.scale = float(linear.weight.abs().max()) / 127
            self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) * self.scale).T

    model = make_model()
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    truth = model(IDS).logits
    found = capture(model, [IDS[0]], [1]).residuals[1]
    bridge = load_model(model)
    assert torch.equal(bridge(IDS), truth)
    assert torch.equal(capture(bridge, [IDS[0]], [1]).residuals[1], found)
    released: Any = bridge.release()
    assert released.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("size", "said"),
    [(VOCAB + 1, "embeds only"), (VOCAB // 2, "another model"), (VOCAB, "no special token")],
)
def test_another_models_tokenizer_is_refused(size: int, said: str) -> None:
    model, tokenizer = make_model(), word_tokenizer(size)
    with pytest.raises(WrongTokenizer, match=said):
        load_model(model, tokenizer=tokenizer)
    with pytest.raises(WrongTokenizer, match=said):
        capture(make_model(), ["w1 w2"], [0], tokenizer=tokenizer)
