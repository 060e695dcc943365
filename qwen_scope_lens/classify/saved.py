"""A fitted classifier as a JSON file: settings, addresses, the learned numbers, where they hold.

Nothing is pickled, so reading one runs nothing. The file names model, SAEs and their hashes, and a
classifier read back refuses other ones just as the fitted one does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.classify.pooled import Source
from qwen_scope_lens.classify.rules import Rule
from qwen_scope_lens.errors import BadFile, ScopeError
from qwen_scope_lens.files import read_json, write_json

if TYPE_CHECKING:
    from qwen_scope_lens.classify.estimator import FeatureRuleClassifier

__all__ = ["FORMAT", "VERSION", "load_classifier", "save_classifier"]

FORMAT, VERSION = "qwen-scope-classifier", 1
MADE_BY = "qsl classify fit"


def save_classifier(classifier: FeatureRuleClassifier, path: Path) -> Path:
    """Write a fitted classifier."""
    import sklearn

    from qwen_scope_lens.version import __version__

    source = classifier.source_
    write_json(
        path,
        FORMAT,
        VERSION,
        {
            "task": dict(classifier.task_),
            "settings": _plain(classifier.get_params(deep=False)),
            "classes": _plain(classifier.classes_),
            "classes_dtype": classifier.classes_.dtype.str,
            "features": list(classifier.features_),
            "differences": _plain(classifier.differences_),
            "rule": classifier.rule_.to_json(),
            "layer_differences": {str(n): d for n, d in classifier.layer_differences_.items()},
            "n_features_in": int(classifier.n_features_in_),
            "source": None if source is None else source.to_json(),
            "versions": {
                "qwen-scope-lens": __version__,
                "scikit-learn": sklearn.__version__,
                "python": sys.version.split()[0],
            },
        },
    )
    return path


def load_classifier(path: Path, kind: type[FeatureRuleClassifier]) -> FeatureRuleClassifier:
    """Read what `save_classifier` wrote into a `kind`, checking that its parts fit together."""
    content = read_json(path, FORMAT, VERSION, MADE_BY)
    try:
        classifier = kind(**content["settings"])
        classifier.classes_ = _classes(content["classes"], content.get("classes_dtype"))
        classifier.rule_ = Rule.from_json(content["rule"])
        classifier.differences_ = np.array(content["differences"], dtype=np.float64)
        classifier.features_ = tuple(content["features"])
        classifier.layer_differences_ = {
            int(n): float(d) for n, d in content["layer_differences"].items()
        }
        classifier.n_features_in_ = int(content["n_features_in"])
        source = content["source"]
        classifier.source_ = None if source is None else Source.from_json(source)
        classifier.task_ = dict(content["task"])
        _check(classifier)
    except BadFile:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ScopeError) as error:
        raise BadFile(
            f"{path} is damaged ({error}): make it again with `{MADE_BY}`, or restore it"
        ) from error
    return classifier


def _check(classifier: FeatureRuleClassifier) -> None:
    """Raise where the parts of a file that was edited no longer fit."""
    m, rule = len(classifier.features_), classifier.rule_
    if len(classifier.classes_) != 2 or len(classifier.differences_) != m:
        raise ValueError("two classes and one difference a feature are needed")
    for numbers in (rule.thresholds, rule.weights):
        if numbers and len(numbers) != m:
            raise ValueError(f"{len(numbers)} numbers for {m} features")
    n = len(rule.nodes)
    for i, node in enumerate(rule.nodes):
        inner = node.feature >= 0
        if node.feature >= m or (inner and not (i < node.low < n and i < node.high < n)):
            raise ValueError(f"node {i} of the tree does not fit")
    if rule.kind == "tree" and not n:
        raise ValueError("a tree without nodes")
    if not 1 <= rule.at_least <= max(1, m):
        raise ValueError(f"at least {rule.at_least} of {m} features")
    if classifier.source_ is not None:
        known = {facts.ref for facts in classifier.source_.layers}
        for address in classifier.features_:
            if str(FeatureRef.parse(address).sae) not in known:
                raise ValueError(f"{address} is of none of its SAEs {sorted(known)}")


def _classes(values: list[Any], dtype: str | None) -> np.ndarray:
    """The classes in the dtype that they had; `dtype` is None in files of older versions."""
    kind = None if dtype is None else np.dtype(dtype)
    if kind is not None and kind.kind not in "biufUSO":
        raise ValueError(f"classes of type {dtype}: expected numbers or texts")
    return np.array(values, dtype=kind)


def _plain(value: Any) -> Any:
    """numpy -> Python, all the way down."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())  # an array of objects may hold numpy's own
    return value.item() if isinstance(value, np.generic) else value
