"""Our bridge keeps what SAELens and TransformerLens promise: state dicts, names, norms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import datasets
import pytest
import torch
from accelerate import cpu_offload
from sae_lens import ActivationsStore
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper, get_deep_attr
from tiny_models import CLASSES, CONTEXT, make_model, make_sae, make_tokenizer
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadText, UnknownHook, WrongModel, WrongState
from qwen_scope_lens.models import ScopeBridge, load_model

HOOK = "blocks.1.hook_resid_post"
ACTS = f"{HOOK}.hook_sae_acts_post"
IDS = torch.tensor([[72, 101, 258, 108, 111, 33]])
KINDS = [(kind, False) for kind in (*CLASSES, "Qwen3Model")] + [
    (kind, True) for kind in CLASSES if "Conditional" not in kind
]
no_grad = torch.no_grad()


def make_bridge(kind: str = "Qwen3ForCausalLM", full: bool = False, seed: int = 0) -> ScopeBridge:
    if kind == "Qwen3Model":
        return load_model(make_model(seed=seed).model, tokenizer=make_tokenizer())
    return load_model(make_model(kind, seed=seed), tokenizer=make_tokenizer(), full_hooks=full)


@pytest.fixture(params=["thin", "full"])
def bridge(request: Any) -> ScopeBridge:
    return make_bridge(full=request.param == "full")


# A state dict is whole, or it is refused.


@pytest.mark.parametrize(("kind", "full"), KINDS)
def test_a_state_dict_is_whole(kind: str, full: bool) -> None:
    source = make_bridge(kind, full)
    state = source.state_dict()
    held = {tensor.data_ptr() for tensor in state.values()}
    assert {p.data_ptr() for p in source.parameters()} <= held
    assert not any(tensor.requires_grad for tensor in state.values())
    for assign in (False, True) if kind == "Qwen3_5MoeForCausalLM" else (False,):
        target = make_bridge(kind, full, seed=1)
        assert not torch.equal(next(target.parameters()), next(source.parameters()))
        result = target.load_state_dict(copy.deepcopy(state), assign=assign)
        assert result.missing_keys == result.unexpected_keys == []
        for (name, mine), theirs in zip(
            target.named_parameters(), source.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), name
        layers = len(source.blocks)
        truth = source(IDS, stop_at_layer=layers)
        assert torch.equal(target(IDS, stop_at_layer=layers), truth)
    if not full:  # the names are HF's own
        assert list(state) == list(source.release().state_dict())


@pytest.mark.parametrize("full", [False, True])
def test_a_part_of_a_state_dict_is_refused(full: bool) -> None:
    target = make_bridge(full=full)
    before = [p.clone() for p in target.parameters()]
    state = {name: torch.zeros_like(t) for name, t in target.state_dict().items()}
    norm = next(name for name in state if "q_norm" in name)
    part = {name: tensor for name, tensor in state.items() if name != norm}
    with pytest.raises(WrongState, match=rf"1 of \d+ tensors are missing .*{norm}.*Nothing was"):
        target.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"1 are not known here \(the first is else"):
        target.load_state_dict(state | {"else": torch.zeros(1)})
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), before, strict=True))
    result = target.load_state_dict(part | {"else": torch.zeros(1)}, strict=False)
    assert result.missing_keys == [norm]
    assert result.unexpected_keys == ["else"]
    assert sum(bool(p.any()) for p in target.parameters()) == 1


def test_a_full_bridge_takes_hf_names_too() -> None:
    truth = make_bridge(seed=1)
    full = make_bridge(full=True)
    bias = torch.zeros(truth.cfg.d_vocab)  # the full adapter adds one
    state = truth.state_dict() | {"lm_head.bias": bias}
    assert full.load_state_dict(state).missing_keys == []
    torch.testing.assert_close(full(IDS), truth(IDS), rtol=1e-4, atol=1e-4)


def test_a_state_dict_without_its_weights_is_refused() -> None:
    with pytest.raises(WrongModel, match=r"would lack 1 of its tensors .*model\.norm\.weight"):
        torch.nn.ModuleDict({"inner": make_bridge()}).state_dict()
    full = make_bridge(full=True)
    assert len(torch.nn.ModuleDict({"inner": full}).state_dict()) >= len(full.state_dict())
    offloaded = make_model()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(WrongModel, match="offloaded"):
        load_model(offloaded).state_dict()


# SAELens's names and places.


@no_grad
def test_the_unfiltered_cache_has_the_name_that_saelens_gives(bridge: ScopeBridge) -> None:
    sae = make_sae()
    name = bridge.get_sae_hook_name(sae)
    assert name == "blocks.1.hook_out.hook_sae_acts_post"
    _, cache = bridge.run_with_cache_with_saes(IDS, saes=[sae])
    assert name in list(cache)
    assert ACTS not in list(cache)  # listed once
    assert ACTS in cache
    assert cache[ACTS] is cache[name]
    assert cache["blocks.1.hook_out"] is cache[HOOK]
    assert "blocks.1.hook_outt" not in cache
    with pytest.raises(KeyError):
        cache["blocks.1.hook_outt"]
    moved = cache.to("cpu")
    assert torch.equal(moved[ACTS], moved[name])
    _, plain = bridge.run_with_cache_with_saes(IDS, saes=[sae], return_cache_object=False)
    assert isinstance(plain, dict)
    assert torch.equal(plain[ACTS], plain[name])
    assert plain.get(ACTS) is plain[name]
    assert plain.get("no such") is None
    _, filtered = bridge.run_with_cache_with_saes(IDS, saes=[sae], names_filter=ACTS)
    assert list(filtered) == [ACTS]
    assert filtered[name] is filtered[ACTS]


@no_grad
def test_hooks_that_stay_write_into_the_cache_that_was_returned(bridge: ScopeBridge) -> None:
    for as_object in (True, False):
        _, cache = bridge.run_with_cache(
            IDS, names_filter=HOOK, reset_hooks_end=False, return_cache_object=as_object
        )
        bridge(IDS[:, :3])
        assert cache[HOOK].shape[1] == 3
        bridge.reset_hooks()
    _, cache = bridge.run_with_cache(IDS, names_filter="blocks.1.hook_out")
    assert cache["resid_post", 1] is cache["blocks.1.hook_out"]


def test_gradients_are_found_by_both_names() -> None:
    _, cache = make_bridge().run_with_cache(IDS, return_type="loss", incl_bwd=True)
    assert cache["blocks.1.hook_out_grad"] is cache[f"{HOOK}_grad"]


@no_grad
def test_the_wrapper_stands_where_saelens_puts_it(bridge: ScopeBridge) -> None:
    point = bridge.blocks[1].hook_out
    first, second = make_sae(), make_sae()
    bridge.add_sae(first, use_error_term=True)
    wrapper = get_deep_attr(bridge, bridge._resolve_hook_name(HOOK))
    assert isinstance(wrapper, _SAEWrapper)
    assert wrapper.use_error_term is True
    assert wrapper.sae is first
    with bridge.saes([second]):
        assert get_deep_attr(bridge, "blocks.1.hook_out").sae is second
    assert get_deep_attr(bridge, "blocks.1.hook_out").sae is first
    assert bridge.hook_dict[HOOK] is point
    seen: list[Tensor] = []
    bridge.blocks[1].hook_out.add_hook(lambda x, hook: seen.append(x))  # of the wrapper
    bridge(IDS)
    assert len(seen) == 1
    bridge.reset_saes()
    assert bridge.blocks[1].hook_out is point
    assert isinstance(point, HookPoint)
    bridge(IDS)
    assert len(seen) == 2


@no_grad
def test_two_at_one_point_come_off_in_any_order(bridge: ScopeBridge) -> None:
    plain, point = bridge(IDS), bridge.blocks[1].hook_out
    one, other = make_sae(), make_sae()
    other.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    other.cfg.metadata.hook_name_out = HOOK
    alone = bridge.run_with_saes(IDS, saes=[other])
    for first, second in ((one, other), (other, one)):
        bridge.add_sae(first)
        bridge.add_sae(second)
        bridge.reset_saes(one.cfg.metadata.hook_name)
        assert torch.equal(bridge(IDS), alone)
        bridge.reset_saes()
        assert bridge.blocks[1].hook_out is point
        assert torch.equal(bridge(IDS), plain)


def test_the_activations_store_takes_an_sae_as_it_is_loaded() -> None:
    sae = qsl.load_sae("mini-qwen3/w1k-l0-16/6")
    model = load_model("mini-qwen3")
    rows = [{"text": "The package manager installs programs. " * 40}] * 10
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=datasets.Dataset.from_list(rows),
        streaming=False,
        store_batch_size_prompts=1,
        n_batches_in_buffer=2,
        train_batch_size_tokens=64,
    )
    assert store.get_batch_tokens().shape == (1, 1024)


# Texts longer than the context.


def test_to_tokens_cuts_as_transformer_lens_does_and_a_run_refuses(bridge: ScopeBridge) -> None:
    long = "a" * (CONTEXT + 40)
    with pytest.warns(UserWarning, match=f"has {CONTEXT + 40} tokens, the context {CONTEXT}"):
        assert bridge.to_tokens(long).shape == (1, CONTEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bridge.to_tokens(long, truncate=True).shape == (1, CONTEXT)
        assert bridge.to_tokens([long, "b"], truncate=False).shape == (2, CONTEXT + 40)
        assert bridge.to_tokens("a" * CONTEXT).shape == (1, CONTEXT)
    runs: list[Any] = [
        lambda: bridge(long),
        lambda: bridge([long]),
        lambda: bridge([long, "b"]),
        lambda: bridge.run_with_cache(long),
        lambda: bridge.run_with_hooks(long, fwd_hooks=[]),
        lambda: bridge.run_with_saes(long, saes=[make_sae()]),
        lambda: bridge.generate(long, max_new_tokens=1, verbose=False),
        lambda: bridge.generate([long, "b"], max_new_tokens=1, verbose=False),
        lambda: list(bridge.generate_stream(long, 1, verbose=False)),
    ]
    for run in runs:
        with pytest.raises(BadText, match=f"{CONTEXT + 40} tokens, the context {CONTEXT}"):
            run()


# Norms of a model whose weights are not folded.


@no_grad
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5ForCausalLM"])
def test_a_stack_goes_through_the_whole_norm(kind: str) -> None:
    model = make_model(kind)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.add_(torch.randn(weight.shape, generator=torch.manual_seed(len(name))) / 3)
    full = load_model(model, tokenizer=make_tokenizer(), full_hooks=True)
    logits, cache = full.run_with_cache(IDS)
    for layer, mlp, norm, entering in (
        (1, False, "blocks.1.ln1", "blocks.1.hook_resid_pre"),
        (2, True, "blocks.2.ln2", "blocks.2.hook_resid_mid"),
        (None, False, "ln_final", "blocks.3.hook_resid_post"),
    ):
        halves = torch.stack([cache[entering] * 0.25, cache[entering] * 0.75])
        normed = cache.apply_ln_to_stack(halves, layer, mlp_input=mlp)
        truth = cache[f"{norm}.hook_out"]
        torch.testing.assert_close(normed.sum(0), truth, rtol=1e-4, atol=1e-4)
        again = cache.apply_ln_to_stack(cache[entering][None], layer, mlp, recompute_ln=True)
        torch.testing.assert_close(again[0], truth, rtol=1e-4, atol=1e-4)
    stream = torch.stack([cache[f"blocks.{n}.hook_resid_post"] for n in range(4)])
    parts = torch.cat([cache["blocks.0.hook_resid_pre"][None], stream])
    parts[1:] -= parts[:-1].clone()  # the embedding, and what each layer adds
    by_part = cache.logit_attrs(parts, tokens=33)
    torch.testing.assert_close(by_part.sum(0), logits[..., 33], rtol=1e-3, atol=1e-3)
    if kind == "Qwen3ForCausalLM":
        onto = torch.randn(32, 2)
        neurons = cache.stack_neuron_results(2, apply_ln=True) @ onto
        found = cache.stack_neuron_results(2, apply_ln=True, project_output_onto=onto)
        torch.testing.assert_close(found, neurons, rtol=1e-4, atol=1e-4)


def test_the_thin_adapter_has_no_scales_of_norms() -> None:
    _, cache = make_bridge().run_with_cache(IDS)
    with pytest.raises(UnknownHook, match=r"full_hooks=True"):
        cache.apply_ln_to_stack(cache[HOOK][None], 1)


@no_grad
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(default: torch.dtype, bridge: ScopeBridge) -> None:
    sae = make_sae()
    truth = bridge.run_with_saes(IDS, saes=[sae], use_error_term=True)
    torch.set_default_dtype(default)
    try:
        full = bridge.is_full
        model = make_model(dtype=torch.float32)
        again = load_model(model, tokenizer=make_tokenizer(), full_hooks=full)
        assert again.cfg.dtype == torch.float32
        found = again.run_with_saes(IDS, saes=[sae], use_error_term=True)
        assert torch.equal(again(["Hello", "Hi there"])[1], bridge(["Hello", "Hi there"])[1])
        loaded = qsl.load_sae("mini-qwen3/w1k-l0-16/6")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, truth)
