"""Qwen-Scope for SAELens and TransformerLens.

Importing this package changes nothing elsewhere; `install()` does, and `uninstall()` undoes it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope_lens.address import FeatureRef, LayerRef
    from qwen_scope_lens.catalog import GROUPS, Group, find_group
    from qwen_scope_lens.classification.estimator import FeatureRuleClassifier
    from qwen_scope_lens.errors import ScopeError
    from qwen_scope_lens.features.corpus import read_corpus
    from qwen_scope_lens.features.extract import extract
    from qwen_scope_lens.features.rank import rank
    from qwen_scope_lens.features.store import FeatureStore
    from qwen_scope_lens.models.capture import Capture, capture, iter_captures
    from qwen_scope_lens.models.check import verify_model
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.saes.load import load_directions, load_sae
    from qwen_scope_lens.saes.register import install, is_installed, uninstall
    from qwen_scope_lens.saes.sae import ScopeSAE
    from qwen_scope_lens.saes.sparse import SparseCodes
    from qwen_scope_lens.saes.verify import Verification, verify
    from qwen_scope_lens.steering.hooks import steer
    from qwen_scope_lens.steering.plan import Edit, Plan

__version__ = "0.1.0"

# Where each public name lives. Names are imported on first use, so that `qsl --help` and
# `import qwen_scope_lens` do not wait seconds for torch, SAELens and TransformerLens.
_HOME = {
    "GROUPS": "catalog",
    "Capture": "models.capture",
    "Edit": "steering.plan",
    "FeatureRef": "address",
    "FeatureStore": "features.store",
    "FeatureRuleClassifier": "classification.estimator",
    "Group": "catalog",
    "LayerRef": "address",
    "Plan": "steering.plan",
    "ScopeError": "errors",
    "ScopeSAE": "saes.sae",
    "SparseCodes": "saes.sparse",
    "Verification": "saes.verify",
    "capture": "models.capture",
    "extract": "features.extract",
    "find_group": "catalog",
    "install": "saes.register",
    "is_installed": "saes.register",
    "iter_captures": "models.capture",
    "load_directions": "saes.load",
    "load_model": "models.load",
    "load_sae": "saes.load",
    "steer": "steering.hooks",
    "rank": "features.rank",
    "read_corpus": "features.corpus",
    "uninstall": "saes.register",
    "verify": "saes.verify",
    "verify_model": "models.check",
}

__all__ = [
    "GROUPS",
    "Capture",
    "Edit",
    "FeatureRef",
    "FeatureRuleClassifier",
    "FeatureStore",
    "Group",
    "LayerRef",
    "Plan",
    "ScopeError",
    "ScopeSAE",
    "SparseCodes",
    "Verification",
    "__version__",
    "capture",
    "extract",
    "find_group",
    "install",
    "is_installed",
    "iter_captures",
    "load_directions",
    "load_model",
    "load_sae",
    "rank",
    "read_corpus",
    "steer",
    "uninstall",
    "verify",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
