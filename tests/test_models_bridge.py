"""TransformerLens's defects D1 to D14 on Qwen are repaired or refused; each has a test."""

from __future__ import annotations

import builtins
import copy
import subprocess
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import CLASSES, make_model, make_tokenizer
from torch import Tensor

from qwen_scope_lens.errors import (
    BadText,
    LayerOutOfRange,
    UnknownHook,
    WrongModel,
    WrongTokenizer,
)
from qwen_scope_lens.models import ScopeBridge, capture, load_model

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[72, 101, 108, 108, 111, 33]])
HYBRID = "Qwen3_5ForCausalLM"
no_grad = torch.no_grad()


def make_bridge(kind: str = "Qwen3ForCausalLM", **options: Any) -> ScopeBridge:
    return load_model(make_model(kind), tokenizer=make_tokenizer(), **options)


@no_grad
@pytest.mark.parametrize("kind", [k for k in CLASSES if "Conditional" in k])
def test_d1_d2_a_wrapper_needs_no_torchvision_and_installs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    truth = model(IDS).logits
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    real_import = builtins.__import__

    def no_vision(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a subprocess was started: {args}")

    monkeypatch.setattr(builtins, "__import__", no_vision)
    monkeypatch.setattr(subprocess, "Popen", never)
    assert torch.equal(load_model(model)(IDS), truth)
    # Mapped weights are at other addresses, so that HF itself differs by rounding.
    torch.testing.assert_close(load_model(tmp_path)(IDS), truth, rtol=1e-5, atol=1e-5)
    assert torch.allclose(load_model(tmp_path, full_hooks=True)(IDS), truth, atol=1e-4)


def test_d1_the_full_adapter_on_a_wrapper_object_is_refused() -> None:
    with pytest.raises(WrongModel, match=r"torchvision.*Load by name"):
        make_bridge("Qwen3_5ForConditionalGeneration", full_hooks=True)


@no_grad
@pytest.mark.parametrize("kind", [HYBRID, "Qwen3_5MoeForCausalLM"])
@pytest.mark.parametrize("full", [False, True])
def test_d3_linear_attention_without_a_cache(kind: str, full: bool) -> None:
    model = make_model(kind)
    truth = model(IDS, use_cache=False).logits
    bridge = load_model(model, full_hooks=full)
    for use_cache in (True, False):
        torch.testing.assert_close(bridge(IDS, use_cache=use_cache), truth, rtol=1e-4, atol=1e-4)
    hf: Any = bridge.release()
    linear = hf.model.layers[0].linear_attn
    assert "chunk_gated_delta_rule" not in vars(linear)


@no_grad
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", HYBRID])
def test_d4_an_identity_edit_of_a_norm_changes_nothing(kind: str) -> None:
    thin = make_bridge(kind)
    assert not [name for name in thin.hook_dict if "ln" in name or "norm" in name]
    with pytest.raises(UnknownHook, match="full_hooks=True"):
        thin.run_with_hooks(IDS, fwd_hooks=[("blocks.0.ln1.hook_normalized", lambda x, hook: x)])
    full = make_bridge(kind, full_hooks=True)
    plain = full(IDS)
    ends = ("ln1.hook_normalized", "ln_final.hook_normalized")
    norms = [name for name in full.hook_dict if name.endswith(ends)]
    assert norms
    edited = full.run_with_hooks(IDS, fwd_hooks=[(n, lambda x, hook: x.clone()) for n in norms])
    torch.testing.assert_close(edited, plain, rtol=1e-4, atol=1e-4)


def test_d4_unfiltered_gradients_give_the_right_loss() -> None:
    bridge = make_bridge(HYBRID)
    loss = bridge(IDS, return_type="loss")
    cached, cache = bridge.run_with_cache(IDS, return_type="loss", incl_bwd=True)
    assert torch.equal(cached, loss)
    assert cache[f"{HOOK}_grad"].shape == cache[HOOK].shape


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_pots", "blocks.4.hook_resid_post", "hook_resid_post"]
)
def test_d5_misspelt_hooks_are_refused_before_the_run(name: str, full: bool) -> None:
    bridge = make_bridge(full_hooks=full)
    ran: list[int] = []
    bridge.embed.register_forward_hook(lambda *a: ran.append(1))
    hook = (name, lambda x, hook: x)
    with pytest.raises(UnknownHook, match="no hook point is named"):
        bridge.run_with_hooks(IDS, fwd_hooks=[hook])
    with pytest.raises(UnknownHook, match="no hook point is named"):
        bridge.run_with_cache(IDS, names_filter=[HOOK, name])
    with pytest.raises(UnknownHook), bridge.hooks(fwd_hooks=[hook]):
        pass
    with pytest.raises(UnknownHook):
        bridge.add_hook(*hook)
    with pytest.raises(UnknownHook, match="matches no hook point"):
        bridge.run_with_cache(IDS, names_filter=lambda found: found == name)
    assert not ran


def test_d5_a_hook_behind_the_last_layer_run_is_refused() -> None:
    bridge = make_bridge()
    with pytest.raises(UnknownHook, match="never reached: this run stops at layer 1"):
        bridge.run_with_cache(IDS, names_filter=HOOK, stop_at_layer=1)
    with pytest.raises(LayerOutOfRange):
        bridge(IDS, stop_at_layer=5)


@no_grad
def test_d6_attention_stays_sdpa() -> None:
    bridge = make_bridge()
    assert bridge.original_model.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # HF warns when attentions are asked of sdpa
        bridge.run_with_cache(IDS)
    full = make_bridge(full_hooks=True)
    assert full.original_model.config._attn_implementation == "eager"
    released: Any = full.release()
    assert released.config._attn_implementation == "sdpa"


@no_grad
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", [k for k in CLASSES if "Conditional" not in k])
def test_d7_the_way_back(kind: str, full: bool, tmp_path: Path) -> None:
    model = make_model(kind)
    before, truth = str(model), model(IDS).logits
    names = list(model.state_dict())
    bridge = load_model(model, full_hooks=full)
    with pytest.raises(WrongModel, match="release"):
        bridge.save_pretrained(tmp_path)
    with pytest.raises(WrongModel, match="inside a bridge already"):
        load_model(model)
    released: Any = bridge.release()
    assert released is model
    assert str(model) == before
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS).logits, truth)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(IDS), truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(WrongModel, match="gave its model back"):
        bridge(IDS)


@no_grad
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", HYBRID])
def test_d8_offloaded_models(kind: str) -> None:
    model = make_model(kind)
    truth = model(IDS, use_cache=False).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    with pytest.raises(WrongModel, match="offloaded"):
        load_model(model, full_hooks=True)
    found = capture(model, [IDS[0]], [1])
    bridge = load_model(model, tokenizer=make_tokenizer())
    assert torch.equal(bridge(IDS), truth)
    _, cache = bridge.run_with_cache("Hello!", names_filter=HOOK)
    assert cache[HOOK].shape == (1, 6, 32)
    assert torch.equal(capture(bridge, [IDS[0]], [1]).residuals[1], found.residuals[1])


@no_grad
def test_d9_generation_stops_at_every_end_token() -> None:
    model = make_model()
    bridge = load_model(model, tokenizer=make_tokenizer())
    assert bridge.end_tokens() == [258, 256]
    for end in (258, 256):

        def always(logits: Tensor, hook: Any, end: int = end) -> Tensor:
            return torch.zeros_like(logits).index_fill(-1, torch.tensor(end), 9.0)

        with bridge.hooks(fwd_hooks=[("unembed.hook_out", always)]):
            out = bridge.generate(IDS, max_new_tokens=5, do_sample=False, verbose=False)
            stream = list(bridge.generate_stream(IDS, 5, verbose=False, return_type="tokens"))
        assert out.tolist() == [[*IDS[0].tolist(), end]]
        assert stream[-1].shape[-1] <= IDS.shape[-1] + 1


def test_d10_the_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    bridge = load_model(tmp_path)
    assert bridge.cfg.dtype == next(bridge.parameters()).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).cfg.dtype == torch.float32


@pytest.mark.parametrize("full", [False, True])
def test_d11_nothing_is_put_before_the_text(full: bool) -> None:
    tokenizer = make_tokenizer()
    bridge = load_model(make_model(), tokenizer=tokenizer, full_hooks=full)
    truth = tokenizer("Hello", return_tensors="pt")["input_ids"]
    for prepend in (None, True, False):
        assert torch.equal(bridge.to_tokens("Hello", prepend_bos=prepend), truth)
    assert bridge.tokenizer is tokenizer
    assert tokenizer.bos_token is None
    bridge.tokenizer = make_tokenizer()
    assert getattr(bridge.tokenizer, "bos_token", "none") is None


@no_grad
@pytest.mark.parametrize("full", [False, True])
def test_d12_hooks_may_compute_in_float32(full: bool) -> None:
    bridge = load_model(
        make_model(dtype=torch.bfloat16), tokenizer=make_tokenizer(), full_hooks=full
    )
    plain = bridge(IDS)

    def widen(x: Tensor, hook: Any) -> Tensor:
        return x.float()

    assert torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=[(HOOK, widen)]), plain)
    with bridge.hooks(fwd_hooks=[(HOOK, widen)]):
        assert torch.equal(bridge(IDS), plain)
    bridge.add_hook(lambda name: name == HOOK, widen)
    assert torch.equal(bridge(IDS), plain)
    bridge.reset_hooks()
    if not full:  # past our own methods too
        bridge.blocks[1].hook_out.add_hook(widen)
        assert torch.equal(bridge(IDS), plain)


@pytest.mark.parametrize("full", [False, True])
def test_d13_processing_is_refused(full: bool) -> None:
    bridge = make_bridge(full_hooks=full)
    for refuse in (bridge.enable_compatibility_mode, bridge.process_weights):
        with pytest.raises(WrongModel, match="unprocessed"):
            refuse()
    bridge.__dict__["_weights_processed"] = True  # of a bridge from elsewhere
    with pytest.raises(WrongModel, match="folded or centred"):
        capture(bridge, ["hello"], [1])


@no_grad
@pytest.mark.parametrize("full", [False, True])
def test_d14_one_tensor_one_name(full: bool) -> None:
    bridge = make_bridge(full_hooks=full)
    for names in (HOOK, [HOOK], lambda name: name == HOOK):
        _, cache = bridge.run_with_cache(IDS, names_filter=names)
        assert list(cache) == [HOOK]
    _, cache = bridge.run_with_cache(IDS, names_filter=lambda name: name.startswith("blocks.1."))
    assert HOOK in cache
    assert "blocks.1.hook_out" not in list(cache)
    assert cache["blocks.1.hook_out"] is cache[HOOK]
    _, everything = bridge.run_with_cache(IDS)
    assert len({id(v) for v in everything.values()}) == len(list(everything))
    wrapper = make_bridge("Qwen3_5ForConditionalGeneration")
    assert not [name for name in wrapper.hook_dict if "vision" in name or "visual" in name]


@no_grad
def test_stop_at_layer_runs_those_layers_and_no_head() -> None:
    bridge = make_bridge()
    ran: list[str] = []
    for name in ("blocks.1", "blocks.2", "blocks.3", "unembed"):
        bridge.get_submodule(name).register_forward_hook(lambda *a, name=name: ran.append(name))
    _, cache = bridge.run_with_cache(IDS)
    ran.clear()
    out, early = bridge.run_with_cache(IDS, names_filter=HOOK, stop_at_layer=2)
    assert ran == ["blocks.1"]
    assert torch.equal(out, cache[HOOK])
    assert torch.equal(early[HOOK], cache[HOOK])
    last = "blocks.3.hook_resid_post"
    assert torch.equal(bridge(IDS, stop_at_layer=4), cache[last])  # all layers, no logits
    assert torch.equal(bridge(IDS, stop_at_layer=-1), cache["blocks.2.hook_resid_post"])
    assert torch.equal(bridge(IDS, stop_at_layer=0), cache["hook_embed"])
    assert bridge(IDS).shape[-1] > 200
    assert torch.equal(bridge.run_with_hooks(IDS, stop_at_layer=2), cache[HOOK])


def test_a_stopped_run_does_not_stop_that_of_another_thread() -> None:
    bridge = make_bridge()
    whole, part = bridge(IDS), bridge(IDS, stop_at_layer=2)
    beside: list[Tensor] = []

    def meanwhile(residual: Tensor, hook: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: beside.append(bridge(IDS)))
            thread.start()
            thread.join()

    hooks = [("blocks.0.hook_resid_post", meanwhile)]
    assert torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=hooks, stop_at_layer=2), part)
    assert len(beside) == 1
    assert torch.equal(beside[0], whole)  # before: the residual after layer 1, in place of logits


def test_texts_are_checked() -> None:
    bridge = make_bridge()
    for empty in ("", [], ["a", ""]):
        with pytest.raises(BadText, match="empty"):
            bridge.to_tokens(empty)
    with pytest.raises(BadText, match=r"300 tokens, the context 256.*truncate=True"):
        bridge("a" * 300)
    assert bridge.to_tokens("a" * 300, truncate=True).shape == (1, 256)
    with pytest.raises(WrongTokenizer, match="no tokenizer"):
        load_model(make_model())("hello")


def test_hooks_are_gone_after_an_exception() -> None:
    bridge = make_bridge()
    plain = bridge(IDS)

    def fail(x: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("in a hook")

    for stop in (None, 3):
        with pytest.raises(RuntimeError, match="in a hook"):
            bridge.run_with_hooks(IDS, fwd_hooks=[(HOOK, fail)], stop_at_layer=stop)
        assert torch.equal(bridge(IDS), plain)


@no_grad
def test_a_deep_copy_is_independent() -> None:
    bridge = make_bridge()
    other = copy.deepcopy(bridge)
    plain = bridge(IDS)
    other.add_hook(HOOK, lambda x, hook: x * 0)
    assert torch.equal(bridge(IDS), plain)
