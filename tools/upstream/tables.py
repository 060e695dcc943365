"""Which of upstream's tests apply to our bridge, which are left out, and how we differ: tables."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """The tests of one package. A key of the two tables is a part of a test's id."""

    package: str
    modules: tuple[str, ...]  # that apply, under `tests/`
    own_tests: str  # our tests of what these check
    left_out: dict[str, str] = field(default_factory=dict)  # not run, and why
    known: dict[str, str] = field(default_factory=dict)  # may fail, and why


SAELENS = Suite(
    package="sae-lens",
    modules=(
        "tests/analysis/test_sae_transformer_bridge.py",
        "tests/loading/test_pretrained_saes_directory.py",
        "tests/loading/test_pretrained_sae_loaders.py",
        "tests/test_evals.py",
        "tests/test_registry.py",
    ),
    own_tests="tests/test_models_upstream.py, test_models_saes.py, test_register.py, test_load.py",
    left_out={
        "with_hf_model_gives_same_results": "it loads a model from the hub as HF's class",
        "test_run_evals_cli": "it loads a model and an SAE from the hub",
    },
    known={
        "test_add_sae_warns_for_invalid_hook_name": "a hook that is not there raises UnknownHook",
        "test_add_sae_disables_hook_z_reshaping": "an SAE on hook_z is refused with WrongModel",
    },
)

_U, _I, _A = (f"tests/{part}/model_bridge/" for part in ("unit", "integration", "acceptance"))

TRANSFORMER_LENS = Suite(
    package="transformer-lens",
    modules=(
        _U + "test_state_dict_round_trip.py",
        _I + "test_bridge_hook_scope.py",
        _I + "test_bridge_stop_at_layer.py",
        _I + "compatibility/test_bridge_cache_behavior.py",
        _I + "compatibility/test_bridge_hook_behavior.py",
        _I + "test_bridge_run_with_cache_incl_bwd.py",
        _I + "test_bridge_run_with_cache_pos_slice.py",
        _I + "test_bridge_run_with_cache_device.py",
        _I + "test_residual_decomposition_identities.py",
        _A + "test_run_with_cache_batch.py",
        _A + "compatibility/test_run_with_cache.py",
        _I + "test_direct_logit_attribution.py",
        _U + "test_optimizer_compatibility.py",
        _U + "test_bridge_generate_kv_cache.py",
        _U + "test_bridge_generate_bos.py",
        _U + "test_batched_string_padding.py",
        _U + "test_bridge_generate_no_tokenizer.py",
    ),
    own_tests="tests/test_models_bridge.py and test_models_upstream.py",
    left_out={
        "test_batched_string_padding.py": "it runs in compatibility mode, which SAEs must not have",
        "test_run_with_hooks_batch_matches": "it names layer 11 of GPT-2, the toy model has 8",
        "test_bridge_generate_no_tokenizer.py": "it feeds token ids of GPT-2's vocabulary",
    },
    known={
        "test_run_with_hooks_stop_at_layer_default": "a hook behind the stop raises UnknownHook",
        "test_incl_bwd_rejects_stop_at_layer": "the hook behind the stop raises UnknownHook first",
        "test_prepend_bos_true_adds_bos": "Qwen has no BOS: nothing is ever put before a text",
        "test_prepend_bos_difference_is_one_token": "Qwen has no BOS: nothing is put first",
        "test_generate_stream_prepend_bos_true": "Qwen has no BOS: nothing is put before a text",
    },
)

SUITES: dict[str, Suite] = {s.package: s for s in (SAELENS, TRANSFORMER_LENS)}
KNOWN_BENCHMARKS: dict[str, str] = {
    "thin/hook_functionality": "it edits an attention hook, the thin adapter has the residual only",
    "mini-qwen3.5/full/hook_functionality": "it edits blocks.0.attn, Qwen3.5's is linear attention",
}
