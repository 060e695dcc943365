"""`verify_model`: the checks of the model, around `saes.verify.verify`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_models import CLASSES, make_model, make_sae, make_tokenizer

from qwen_scope_lens.errors import UnknownHook, VerificationFailed, WrongModel
from qwen_scope_lens.models import load_model, verify_model
from qwen_scope_lens.models import verify as check
from qwen_scope_lens.models.verify import hook_difference, sample_texts
from qwen_scope_lens.saes import load_sae, verify

FVU = 0.3
calls: list[dict[str, Any]] = []


class Found:
    """What the tests here read of a `Verification`."""

    convention, fvu = "as documented", {"as documented": FVU}

    def __str__(self) -> str:
        return f"FVU {FVU}"


def stand_in(sae: Any, activations: Any, *, mask: Any = None, max_fvu: float = 0.8) -> Found:
    """A stand-in for `saes.verify.verify`, which has tests of its own."""
    calls.append({"activations": activations, "mask": mask})
    if max_fvu < FVU:
        raise VerificationFailed(f"FVU {FVU} is above {max_fvu}")
    return Found()


@pytest.fixture(autouse=True)
def verification(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    monkeypatch.setattr(check, "verify", stand_in)


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration"])
@pytest.mark.parametrize("bridged", [False, True])
def test_the_report(kind: str, bridged: bool) -> None:
    model: Any = make_model(kind)
    model = load_model(model) if bridged else model
    found = verify_model(model, make_sae(), tokenizer=make_tokenizer())
    assert found.hook_difference == 0.0
    assert (found.layer, found.d_model) == (1, 32)
    report = str(found)
    assert "blocks.1.hook_resid_post is the output of decoder layer 1" in report
    assert "NOTE: the SAE does not say on which model" in report
    assert f"FVU {FVU}" in report
    activations, mask = calls[0]["activations"], calls[0]["mask"]
    assert activations.shape == (*mask.shape, 32)
    assert int((~mask).sum()) >= len(sample_texts())  # first tokens are left out


@pytest.mark.parametrize("kind", CLASSES)
def test_the_right_module_is_hooked(kind: str) -> None:
    model, tokenizer = make_model(kind), make_tokenizer()
    assert hook_difference(model, 2, "some text", tokenizer) == 0.0
    bridge = load_model(model, tokenizer=tokenizer)
    assert hook_difference(bridge, 2, "some text") == 0.0
    with bridge.saes(make_sae(layer=2)):
        assert hook_difference(bridge, 2, "some text") > 0.1


def test_an_edited_model_is_refused() -> None:
    bridge = load_model(make_model(), tokenizer=make_tokenizer())
    bridge.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * 2)
    with pytest.raises(WrongModel, match="a hook or an SAE is active"):
        verify_model(bridge, make_sae())


def test_another_width_hook_or_layer() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(WrongModel, match=r"d_in=16.*d_model=32"):
        verify_model(model, make_sae(d_in=16), tokenizer=tokenizer)
    sae = make_sae()
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    with pytest.raises(UnknownHook, match="hook_resid_post"):
        verify_model(model, sae, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="layer 7"):
        verify_model(model, make_sae(layer=7), tokenizer=tokenizer)
    assert not calls


def test_a_base_sae_on_an_instruct_or_quantised_model() -> None:
    model, sae, tokenizer = make_model(), make_sae(), make_tokenizer()
    sae.cfg.metadata.model_name = "Qwen/Qwen3-8B-Base"
    model.config._name_or_path = "Qwen/Qwen3-8B"
    notes = verify_model(model, sae, tokenizer=tokenizer).notes
    assert "trained on Qwen/Qwen3-8B-Base, this is Qwen/Qwen3-8B, its instruct version" in notes[0]
    model.is_quantized = True
    with pytest.raises(VerificationFailed, match=r"(?s)above 0\.1.*instruct version.*quantised"):
        verify_model(model, sae, tokenizer=tokenizer, max_fvu=0.1)
    model.config._name_or_path = "/models/Qwen3-8B-Base/"
    assert verify_model(model, sae, tokenizer=tokenizer).notes == (
        "the model's weights are quantised, the SAE was trained on unquantised ones",
    )
    assert torch.is_tensor(calls[0]["activations"])


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5ForCausalLM"])
def test_with_the_real_measurement(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SAE that keeps both signs of every coordinate reconstructs any model exactly."""
    monkeypatch.setattr(check, "verify", verify)
    sae = make_sae(d_sae=64, k=32)
    eye = torch.eye(32)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    found = verify_model(make_model(kind), sae, tokenizer=make_tokenizer())
    assert found.verification.fvu["as documented"] < 1e-6
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.flip(0))
    with pytest.raises(VerificationFailed, match="right layer"):
        verify_model(make_model(kind), sae, tokenizer=make_tokenizer())


def test_a_layer_counted_from_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real residuals of neighbouring layers are so alike that either passes alone."""
    monkeypatch.setattr(check, "verify", verify)
    model, sae = load_model("mini-qwen3"), load_sae("mini-qwen3/w1k-l0-16/4")
    found = verify_model(model, sae)
    own = found.verification.fvu["as documented"]
    assert set(found.neighbours) == {3, 5}
    assert all(fvu > own for fvu in found.neighbours.values())
    assert f"FVU {found.neighbours[5]:.4f} on layer 5" in str(found)
    moved = deepcopy(sae)
    moved.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    with pytest.raises(VerificationFailed, match=r"layer 4 better .* than those of layer 3"):
        verify_model(model, moved, max_fvu=10)


def test_the_sample() -> None:
    texts = sample_texts()
    assert len(texts) >= 15
    assert all(texts)
    joined = "".join(texts)
    for letter in "üéж的の극كग{":
        assert letter in joined
