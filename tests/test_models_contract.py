"""Private names of upstream on which we rely. If a new version moves one, a test here fails."""

from __future__ import annotations

import inspect

from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tiny_models import make_model, make_sae, make_tokenizer
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from qwen_scope_lens.models import adapters, load_model
from qwen_scope_lens.models.architecture import PLACES


def test_saelens_wrapper() -> None:
    wrapper = _SAEWrapper(make_sae(), use_error_term=True)
    assert {"hook_sae_input", "hook_sae_acts_post", "hook_sae_error", "hook_sae_output"} <= {
        name for name, _ in wrapper.named_modules()
    }
    for name in ("capture_input", "set_token_mask"):
        assert callable(getattr(wrapper, name))
    assert "_captured_input" in vars(wrapper)
    assert "_token_mask" in vars(wrapper)


def test_saelens_bridge() -> None:
    source = inspect.getsource(SAETransformerBridge)
    for name in ("_acts_to_saes", "_resolve_hook_name", "_reset_sae"):
        assert name in source
    bridge = load_model(make_model())
    assert bridge._acts_to_saes == {}
    assert bridge._resolve_hook_name("blocks.1.hook_resid_post") == "blocks.1.hook_out"


def test_transformer_lens_bridge() -> None:
    assert isinstance(TransformerBridge.hook_dict, property)
    bridge = load_model(make_model(), tokenizer=make_tokenizer())
    assert "blocks.1.hook_out" in bridge._hook_registry
    assert bridge._tokenizer is bridge.tokenizer
    assert vars(bridge)["original_model"] is bridge.original_model
    assert bridge._weights_processed is bridge.compatibility_mode is False
    assert bridge._gated_hook_reason("blocks.1.hook_resid_post") is None
    assert bridge.blocks[0]._modules["_original_component"] is bridge.blocks[0].original_component
    assert "_capture_hf_cache" in inspect.getsource(TransformerBridge)
    assert StopAtLayerException("x").layer_output == "x"
    order = list(inspect.signature(TransformerBridge.generate).parameters)
    assert order[1:5] == ["input", "max_new_tokens", "stop_at_eos", "eos_token_id"]
    order = list(inspect.signature(TransformerBridge.generate_stream).parameters)
    assert order[1:6] == [
        "input",
        "max_new_tokens",
        "max_tokens_per_yield",
        "stop_at_eos",
        "eos_token_id",
    ]


def test_transformer_lens_caches_and_state_dicts() -> None:
    order = list(inspect.signature(ActivationCache.apply_ln_to_stack).parameters)
    assert order[1:] == [
        "residual_stack",
        "layer",
        "mlp_input",
        "pos_slice",
        "batch_slice",
        "has_batch_dim",
        "recompute_ln",
    ]
    inner = ActivationCache._stack_neuron_results_apply_ln_projected
    expected = ["layer", "pos_slice", "neuron_slice", "project_2d"]
    assert list(inspect.signature(inner).parameters)[1:] == expected
    bridge = load_model(make_model(), full_hooks=True)
    assert "blocks.0.attn.q.weight" in bridge._tl_key_to_actual_keys()
    assert bridge.ln_final.config.rmsnorm_uses_offset is False


def test_transformer_lens_components() -> None:
    assert callable(GeneralizedComponent.set_original_component)
    assert HookPoint().ctx == {}
    for name in ("supports_hf_output_attentions", "supports_compatibility_mode"):
        assert getattr(adapters.ResidualAdapter, name) is False


def test_registration_touches_our_names_only() -> None:
    before = dict(ArchitectureAdapterFactory._adapters)
    adapters.register_adapters()
    once = dict(ArchitectureAdapterFactory._adapters)
    adapters.register_adapters()
    assert once == ArchitectureAdapterFactory._adapters
    for name, found in before.items():
        assert once[name] is found
    ours = {adapters.residual_name(row.hf_class) for row in PLACES}
    assert ours <= set(once)
    assert set(once) - set(before) <= ours
