"""SAEs on a bridge: the defects of SAELens's own bridge, each repaired or refused."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import pytest
import torch
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from tiny_models import make_model, make_sae, make_tokenizer
from torch import Tensor

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import UnknownHook, WrongModel
from qwen_scope_lens.models import ScopeBridge, load_model

HOOK = "blocks.1.hook_resid_post"
ACTS = f"{HOOK}.hook_sae_acts_post"
IDS = torch.tensor([[72, 101, 258, 108, 111, 33]])
no_grad = torch.no_grad()


@pytest.fixture(params=["thin", "full"])
def bridge(request: Any) -> ScopeBridge:
    return load_model(make_model(), tokenizer=make_tokenizer(), full_hooks=request.param == "full")


def zeros(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


@no_grad
def test_run_with_saes_puts_the_reconstruction_in_place(bridge: ScopeBridge) -> None:
    sae = make_sae()
    _, cache = bridge.run_with_cache(IDS, names_filter=HOOK)
    truth = bridge.run_with_hooks(IDS, fwd_hooks=[(HOOK, lambda x, hook: sae(x))])
    assert torch.equal(bridge.run_with_saes(IDS, saes=[sae]), truth)
    _, attached = bridge.run_with_cache_with_saes(IDS, saes=sae, names_filter=[ACTS, HOOK])
    assert torch.equal(attached[ACTS], sae.encode(cache[HOOK]))
    assert torch.equal(attached[HOOK], sae(cache[HOOK]))  # what flows on
    assert bridge.acts_to_saes == {}


@no_grad
def test_1_hook_dict_keeps_its_aliases(bridge: ScopeBridge) -> None:
    assert HOOK in bridge.hook_dict
    fired = []
    bridge.run_with_hooks(IDS, fwd_hooks=[(HOOK, lambda x, hook: fired.append(x.shape))])
    assert fired == [(1, 6, 32)]
    _, cache = bridge.run_with_cache(IDS, names_filter=[HOOK])
    assert list(cache) == [HOOK]


def make_store(bridge: ScopeBridge, sae: Any) -> ActivationsStore:
    sae.cfg.metadata.context_size = 8
    return ActivationsStore.from_sae(
        bridge,
        sae,
        dataset=datasets.Dataset.from_list([{"text": "abcdefgh" * 8}] * 16),
        context_size=8,
        store_batch_size_prompts=2,
        n_batches_in_buffer=2,
        train_batch_size_tokens=16,
        streaming=False,
    )


def test_1_run_evals(bridge: ScopeBridge) -> None:
    sae = make_sae()
    config = EvalConfig(
        batch_size_prompts=2,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    found, _ = run_evals(
        sae, make_store(bridge, sae), bridge, ActivationScaler(), eval_config=config
    )
    assert found["sparsity"]["l0"] == 8.0
    losses = found["model_performance_preservation"]
    assert losses["ce_loss_with_sae"] != losses["ce_loss_without_sae"]


@no_grad
def test_1_the_activation_store_and_its_bos(bridge: ScopeBridge) -> None:
    """Also defect 8: although metadata says prepend_bos=True, no token is put before the text."""
    sae = make_sae()
    store = make_store(bridge, sae)
    tokens = store.get_batch_tokens()
    assert tokens[0].tolist() == bridge.tokenizer("abcdefgh")["input_ids"]
    _, cache = bridge.run_with_cache(tokens, names_filter=HOOK)
    assert torch.equal(store.get_activations(tokens).squeeze(2), cache[HOOK])


@no_grad
def test_2_hooks_fire_again_after_a_reset(bridge: ScopeBridge) -> None:
    before = bridge(IDS)
    point = bridge.hook_dict["blocks.1.hook_out"]
    bridge.run_with_saes(IDS, saes=[make_sae()])
    assert bridge.hook_dict["blocks.1.hook_out"] is point is bridge.blocks[1].hook_out
    for name in ("blocks.1.hook_out", HOOK):
        assert not torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=[(name, zeros)]), before)
    bridge.add_hook(HOOK, zeros)
    assert not torch.equal(bridge(IDS), before)
    bridge.reset_hooks()
    assert torch.equal(bridge(IDS), before)


@no_grad
def test_3_steering_by_the_documented_name(bridge: ScopeBridge) -> None:
    sae, plain = make_sae(), bridge(IDS)

    def double(acts: Tensor, hook: Any) -> Tensor:
        return acts * 2

    steered = [
        bridge.run_with_hooks_with_saes(IDS, saes=[sae], fwd_hooks=[(name, double)])
        for name in (ACTS, bridge.get_sae_hook_name(sae))
    ]
    assert torch.equal(*steered)
    assert not torch.allclose(steered[0], bridge.run_with_saes(IDS, saes=[sae]))
    bridge.add_sae(sae, use_error_term=True)
    bridge.add_hook(ACTS, double)
    added = bridge(IDS)
    assert not torch.allclose(added, plain)
    bridge.reset_hooks()  # out of the attached SAE too
    torch.testing.assert_close(bridge(IDS), plain, rtol=1e-4, atol=1e-4)
    bridge.reset_saes()
    assert torch.equal(bridge(IDS), plain)


@no_grad
def test_4_error_term_and_special_tokens_have_an_effect(bridge: ScopeBridge) -> None:
    sae, plain = make_sae(), bridge(IDS)
    for run in (bridge.run_with_saes, bridge.run_with_hooks_with_saes):
        torch.testing.assert_close(
            run(IDS, saes=[sae], use_error_term=True), plain, rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(run(IDS, saes=[sae], use_error_term=False), plain, atol=1e-2)
    special = IDS[0] == 258
    for exclude in (True, [258]):
        _, cache = bridge.run_with_cache_with_saes(
            IDS, saes=[sae], names_filter=HOOK, exclude_special_tokens=exclude
        )
        _, untouched = bridge.run_with_cache(IDS, names_filter=HOOK)
        same = (cache[HOOK] == untouched[HOOK]).all(-1)[0]
        assert torch.equal(same, special)


@no_grad
@pytest.mark.parametrize("full", [False, True])
def test_5_a_float32_sae_on_a_bfloat16_model(full: bool) -> None:
    model = make_model(dtype=torch.bfloat16)
    bridge = load_model(model, tokenizer=make_tokenizer(), full_hooks=full)
    plain = bridge(IDS)
    assert bridge.run_with_saes(IDS, saes=[make_sae()]).dtype == torch.bfloat16
    close = bridge.run_with_saes(IDS, saes=[make_sae()], use_error_term=True)
    torch.testing.assert_close(close, plain, rtol=0, atol=float(plain.abs().max()) / 50)


@no_grad
def test_6_reset_hooks_while_an_sae_is_attached(bridge: ScopeBridge) -> None:
    bridge.add_sae(make_sae())
    attached = bridge(IDS)
    bridge.reset_hooks(including_permanent=True)
    assert torch.equal(bridge(IDS), attached)  # the SAE stays until reset_saes
    bridge.reset_saes(HOOK)
    with pytest.raises(UnknownHook, match="attached: none"):
        bridge.reset_saes(HOOK)


def test_7_a_missing_hook_or_another_width_raises(bridge: ScopeBridge) -> None:
    with pytest.raises(UnknownHook, match=r"layers are 0\.\.3"):
        bridge.add_sae(make_sae(layer=9))
    wrong = make_sae()
    wrong.cfg.metadata.hook_name = "blocks.1.hook_resid_pots"
    with pytest.raises(UnknownHook, match=r"nearest: blocks.1.hook_resid_post"):
        bridge.run_with_saes(IDS, saes=[wrong])
    with pytest.raises(WrongModel, match=r"d_in=16.*d_model=32"):
        bridge.add_sae(make_sae(d_in=16))
    assert bridge.acts_to_saes == {}


@no_grad
def test_an_sae_of_another_backbone_is_refused_unless_it_is_allowed() -> None:
    """The two minis have one width: only the SAE's metadata tell whose it is."""
    model = qsl.load_model("mini-qwen3")
    own, other = qsl.load_sae("mini-qwen3/w1k-l0-16/6"), qsl.load_sae("mini-qwen3.5/w1k-l0-16/6")
    ids = model.to_tokens("a text of some words")
    for use in (
        lambda **flag: model.add_sae(other, **flag),
        lambda **flag: model.saes([other], **flag).__enter__(),
        lambda **flag: model.run_with_saes(ids, saes=[other], **flag),
        lambda **flag: model.run_with_cache_with_saes(ids, saes=[other], **flag),
        lambda **flag: model.run_with_hooks_with_saes(ids, saes=[other], **flag),
    ):
        with pytest.raises(WrongModel, match=r"qwen3, not qwen3_5.*allow_other_model=True"):
            use()
        assert model.acts_to_saes == {}
        use(allow_other_model=True)
        model.reset_saes()
    model.add_sae(other, allow_other_model=True)
    with model.saes([own]):
        pass
    assert [w.sae for w in model._acts_to_saes.values()] == [other]  # it came back
    model.reset_saes()
    # As SAELens: of an SAE whose metadata name no group, nothing is asked and nothing is said.
    for said in (None, "local/not-here/6", 7):
        other.cfg.metadata.qwen_scope_ref = said
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.run_with_saes(ids, saes=[other])


@no_grad
def test_earlier_saes_come_back(bridge: ScopeBridge) -> None:
    first, second = make_sae(), make_sae(k=2)
    bridge.add_sae(first, use_error_term=True)
    attached = bridge(IDS)
    with bridge.saes([second, make_sae(layer=2)]):
        assert set(bridge.acts_to_saes) == {HOOK, "blocks.2.hook_resid_post"}
        assert bridge.acts_to_saes[HOOK] is second
    assert bridge.acts_to_saes == {HOOK: first}
    assert torch.equal(bridge(IDS), attached)
    with pytest.raises(RuntimeError, match="inside"), bridge.saes(second):
        raise RuntimeError("inside")
    assert bridge.acts_to_saes == {HOOK: first}


@no_grad
def test_generation_with_an_sae(bridge: ScopeBridge) -> None:
    sae = make_sae()
    with bridge.saes(sae):
        out = bridge.generate(
            IDS, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False
        )
        again = IDS
        for _ in range(4):
            again = torch.cat([again, bridge(again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)


def test_gradients_flow_through_an_sae(bridge: ScopeBridge) -> None:
    sae = make_sae()
    bridge.run_with_saes(IDS, saes=[sae]).sum().backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.abs().sum() > 0
