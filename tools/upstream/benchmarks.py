"""TransformerLens's benchmarks of a bridge (`transformer_lens.benchmarks`) on ours.

Those that compare with a `HookedTransformer` run without one, as they do for any model which that
class does not know; those that process weights do not apply, because a bridge for SAEs refuses it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformer_lens.benchmarks as theirs
import transformers

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import bundled_model

TEXT = "The package manager installs programs and their documentation."
NAMES = ("mini-qwen3", "mini-qwen3.5")


def checks(bridge: Any, hf: Any) -> dict[str, Callable[[], Any]]:
    tokens = bridge.to_tokens(TEXT)
    with torch.no_grad():
        logits = hf(tokens).logits
        loss = hf(tokens, labels=tokens).loss.item()
    found: dict[str, Callable[[], Any]] = {
        "forward_pass": lambda: theirs.benchmark_forward_pass(
            bridge, TEXT, reference_logits=logits
        ),
        "logits_equivalence": lambda: theirs.benchmark_logits_equivalence(
            bridge, TEXT, reference_logits=logits
        ),
        "loss_equivalence": lambda: theirs.benchmark_loss_equivalence(
            bridge, TEXT, reference_loss=loss
        ),
        "hook_registry": lambda: theirs.benchmark_hook_registry(bridge),
        "multiple_generation_calls": lambda: theirs.benchmark_multiple_generation_calls(
            bridge, [TEXT, "Install", "A b c"]
        ),
    }
    of_a_text = (
        "forward_hooks critical_forward_hooks gated_hooks_fire hook_functionality"
        " forward_hooks_structure backward_hooks_structure activation_cache_structure"
        " backward_hooks critical_backward_hooks gradient_computation generation"
        " generation_with_kv_cache activation_cache run_with_cache"
    )
    for name in of_a_text.split():
        function = getattr(theirs, f"benchmark_{name}")
        found[name] = partial(function, bridge, TEXT)
    return found


def run() -> dict[str, list[str]]:
    """`model/adapter/benchmark` -> [outcome, what it said]."""
    results: dict[str, list[str]] = {}
    quiet = io.StringIO()
    for name in NAMES:
        folder = str(bundled_model(name))
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for full in (False, True):
            bridge = qsl.load_model(name, full_hooks=full)
            for benchmark, function in checks(bridge, hf).items():
                key = f"{name}/{'full' if full else 'thin'}/{benchmark}"
                with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                    try:
                        result = function()
                        outcome = "passed" if result.passed else "failed"
                        said = result.message
                    except Exception as error:
                        outcome, said = "failed", f"{type(error).__name__}: {error}"
                results[key] = [outcome, " ".join(str(said).split())[:300]]
    return results
