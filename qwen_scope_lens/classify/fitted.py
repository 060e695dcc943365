"""A fitted classifier as frozen data: classes, rule, features and the SAEs that they belong to.

`estimator.py` learns it, `explain.py` and `predict.py` read it. As a JSON file it holds no pickle,
so reading a file runs no code. The file names the model, the SAEs and their hashes, and a
classifier that was read back refuses other ones just as the one that was fitted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.classify.pooled import Source
from qwen_scope_lens.classify.rules import Rule
from qwen_scope_lens.errors import BadFile, ScopeError, StoreMismatch
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.tables import plain

__all__ = ["FORMAT", "VERSION", "FittedRule", "load_fitted"]

FORMAT, VERSION = "qwen-scope-classifier", 1
MADE_BY = "qsl classify fit"


@dataclass(frozen=True, eq=False)
class FittedRule:
    """A rule over m features, and everything that is needed to apply it."""

    classes: np.ndarray  # [2], the second one is positive
    rule: Rule
    features: tuple[Any, ...]  # addresses, or column numbers if it was fitted on an array
    differences: np.ndarray  # Δ of each feature, [m]
    layer_differences: Mapping[int, float]  # layer -> the largest Δ of its features
    source: Source | None  # the model and SAEs; None if it was fitted on an array
    tokens: tuple[float, float] | None = None
    """Of the discovery documents: how many 95% of them have at least, and the median."""

    def __post_init__(self) -> None:
        m, rule = len(self.features), self.rule
        if len(self.classes) != 2 or len(self.differences) != m:
            raise ValueError(f"expected two classes, and one difference for each of {m} features")
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
        known = {facts.ref for facts in self.source.layers} if self.source is not None else set()
        for address in self.features if self.source is not None else ():
            if str(FeatureRef.parse(address).sae) not in known:
                raise ValueError(f"{address} does not belong to its SAEs {sorted(known)}")

    def require_source(self) -> Source:
        """The model and SAEs that it belongs to; raises if it was fitted on an array."""
        if self.source is None:
            raise StoreMismatch(
                "the classifier was fitted on a plain array: it does not say which model and SAE"
                " its columns belong to. Fit it on a store"
            )
        return self.source

    @property
    def places(self) -> list[tuple[int, int]]:
        """The layer and the number of each feature."""
        refs = map(FeatureRef.parse, self.features)
        return [(ref.layer, ref.feature) for ref in refs]

    def shorter(self, tokens: Sequence[int] | np.ndarray | None) -> str:
        """What to say of documents with so many tokens, where they have less than half the length
        of the discovery documents (in the median), and a quarter are shorter than 95% of those.
        Else an empty text."""
        if self.tokens is None or tokens is None or not len(tokens):
            return ""
        least, median = self.tokens
        short = int((np.asarray(tokens) < least).sum())
        if 4 * short < len(tokens) or 2 * np.median(tokens) > median:
            return ""
        return (
            f"{short:,} of {len(tokens):,} documents have fewer than {least:.0f} tokens; of the"
            f" discovery documents 95% have more (median {median:.0f}). The rule reads the largest"
            " value of each feature in a document, which grows with its length, so it misses short"
            " documents of the class. Fit it on documents as long as these"
        )

    def predicted(self, scores: np.ndarray) -> np.ndarray:
        """The class of each score. `[n] -> [n]`"""
        return np.asarray(self.classes[(scores > 0).astype(int)])

    def save(
        self, path: Path, settings: Mapping[str, Any], task: Mapping[str, Any], width: int
    ) -> Path:
        """Write the rule, with the estimator's settings, the task, and the columns that it saw."""
        import sklearn

        from qwen_scope_lens.version import __version__

        content = {
            "task": dict(task),
            "settings": plain(settings),
            "classes": plain(self.classes),
            "classes_dtype": self.classes.dtype.str,
            "features": list(self.features),
            "differences": plain(self.differences),
            "rule": self.rule.to_json(),
            "layer_differences": {str(n): d for n, d in self.layer_differences.items()},
            "n_features_in": int(width),
            "tokens": None if self.tokens is None else list(self.tokens),
            "source": None if self.source is None else self.source.to_json(),
            "versions": {
                "qwen-scope-lens": __version__,
                "scikit-learn": sklearn.__version__,
                "python": sys.version.split()[0],
            },
        }
        write_json(path, FORMAT, VERSION, content)
        return path


def load_fitted(path: Path) -> tuple[FittedRule, dict[str, Any]]:
    """What `FittedRule.save` wrote: the rule after checks, and the content of the file."""
    content = read_json(path, FORMAT, VERSION, MADE_BY)
    try:
        source = content["source"]
        found = FittedRule(
            classes=_classes(content["classes"], content.get("classes_dtype")),
            rule=Rule.from_json(content["rule"]),
            features=tuple(content["features"]),
            differences=np.array(content["differences"], dtype=np.float64),
            layer_differences={int(n): float(d) for n, d in content["layer_differences"].items()},
            source=None if source is None else Source.from_json(source),
            tokens=_lengths(content.get("tokens")),
        )
        content["n_features_in"] = int(content["n_features_in"])
        content["task"], content["settings"] = dict(content["task"]), dict(content["settings"])
    except BadFile:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ScopeError) as error:
        raise damaged(path, error) from error
    return found, content


def damaged(path: Path, error: Exception) -> BadFile:
    """The error for a file whose parts do not fit together."""
    return BadFile(f"{path} is damaged ({error}): make it again with `{MADE_BY}`, or restore it")


def _lengths(found: Any) -> tuple[float, float] | None:
    """Files of older versions have no lengths."""
    if found is None:
        return None
    least, median = map(float, found)
    return least, median


def _classes(values: list[Any], dtype: str | None) -> np.ndarray:
    """The classes in their dtype, which is None in files of older versions."""
    kind = None if dtype is None else np.dtype(dtype)
    if kind is not None and kind.kind not in "biufUSO":
        raise ValueError(f"classes of type {dtype}: expected numbers or texts")
    return np.array(values, dtype=kind)
