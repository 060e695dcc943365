"""A pytest plugin: upstream's own tests of a bridge, run on ours.

Wherever such a test asks for a model by a hub name, it gets the bundled toy model: as our bridge
with all hook points, as a plain HF model, or as its tokenizer. Nothing else is changed, and no test
of theirs. `suites.py` starts pytest with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.models import ScopeBridge

MINI = str(bundled_model("mini-qwen3"))
ON_OURS = ("dtype", "device", "device_map", "n_devices", "trust_remote_code", "load_weights")
_found: dict[str, list[str]] = {}
_left_out: dict[str, str] = json.loads(os.environ.get("UPSTREAM_LEFT_OUT", "{}"))


def _boot(cls: type, model_name: str, **options: Any) -> ScopeBridge:
    refused = {name: value for name, value in options.items() if name not in ON_OURS and value}
    if refused:
        pytest.skip(f"asks boot_transformers for {', '.join(refused)}, which load_model lacks")
    return qsl.load_model(MINI, full_hooks=True, dtype=options.get("dtype"))


def _mini_for_hub_names(cls: Any) -> None:
    theirs = cls.from_pretrained

    def from_pretrained(_: type, name: Any, *args: Any, **options: Any) -> Any:
        local = Path(str(name)).exists()
        return theirs(name if local else MINI, *args, **options)

    cls.from_pretrained = classmethod(from_pretrained)


def _no_hooked_transformer(*args: Any, **options: Any) -> None:
    pytest.skip("asks for a HookedTransformer, whose weights are on the hub only")


def _no_compatibility_mode(*args: Any, **options: Any) -> None:
    pytest.skip("asks for compatibility mode, which a bridge for SAEs refuses")


def pytest_configure(config: pytest.Config) -> None:
    setattr(ScopeBridge, "enable_compatibility_mode", _no_compatibility_mode)  # noqa: B010
    for name in ("from_pretrained", "from_pretrained_no_processing"):
        setattr(HookedTransformer, name, _no_hooked_transformer)
    TransformerBridge.boot_transformers = classmethod(_boot)
    SAETransformerBridge.boot_transformers = classmethod(_boot)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        _mini_for_hub_names(getattr(transformers, name))
    qsl.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        reason = next((why for name, why in _left_out.items() if name in item.nodeid), None)
        if reason is None:
            kept.append(item)
        else:
            _found[item.nodeid] = ["left out", reason]
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        text = report.longreprtext.strip().splitlines() if report.longrepr else []
        if report.skipped and isinstance(report.longrepr, tuple):
            text = [report.longrepr[2]]
        was = _found.get(report.nodeid, ["passed"])[0]
        if was != "failed":
            _found[report.nodeid] = [report.outcome, text[-1] if text else ""]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        text = " ".join(report.longreprtext.split())[-200:]
        lacking = text.partition("No module named ")[2]
        _found[report.nodeid] = (
            ["left out", f"needs the package {lacking}, which we do not depend on"]
            if lacking
            else ["failed", f"cannot be collected: {text}"]
        )


def pytest_runtest_logfinish(nodeid: str) -> None:
    pytest_sessionfinish()  # so that an interrupted run can be read, too


def pytest_sessionfinish() -> None:
    Path(os.environ["UPSTREAM_RESULTS"]).write_text(json.dumps(_found, indent=1), encoding="utf-8")
