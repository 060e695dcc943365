"""Rules and the baselines that they are compared with. All fit and score `Documents`.

The baselines are: always yes; a linear probe and the difference of means on the residual; bag of
words and character n-grams on the text. The learners are those of scikit-learn. `comparison.py`
compares the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
from qwen_scope_lens.classify.pooled import Pooled
from qwen_scope_lens.classify.rules import RULES, f1_of
from qwen_scope_lens.errors import TooLittleData

__all__ = ["Documents", "Method", "baselines", "name_of", "rule_methods"]

NAMES = {
    "or": "OR",
    "k-of-n": "k of n",
    "thresholds": "own thresholds",
    "logistic": "sparse logistic",
    "tree": "small tree",
}
PROBE_CHECK = 5
"""One of this many discovery documents is held out to choose the layer of a probe."""


@dataclass(frozen=True)
class Documents:
    """Texts, whether each is positive, and the data that methods learn from."""

    texts: tuple[str, ...]
    truth: np.ndarray  # bool [n]
    pooled: Pooled
    residuals: Mapping[int, np.ndarray] = field(default_factory=dict)  # layer -> [n, d_model]
    languages: np.ndarray | None = None  # object [n]

    def __post_init__(self) -> None:
        n = len(self.texts)
        parts: list[Any] = [self.truth, self.pooled, *self.residuals.values()]
        if any(len(part) != n for part in parts):
            raise TooLittleData(
                f"{n} texts, but {[len(part) for part in parts]} rows of truth, features and"
                " residuals"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Documents:
        """Some of the documents, by their numbers or by a mask."""
        rows = np.nonzero(rows)[0] if rows.dtype == bool else rows
        return Documents(
            tuple(self.texts[i] for i in rows),
            self.truth[rows],
            self.pooled[rows],
            {layer: x[rows] for layer, x in self.residuals.items()},
            None if self.languages is None else self.languages[rows],
        )


class Method(Protocol):
    """A method learns from documents and scores others; a score above 0 means yes."""

    name: str

    def fit(self, documents: Documents) -> Method: ...

    def score(self, documents: Documents) -> np.ndarray: ...


@dataclass
class AlwaysYes:
    name: str = "always yes"

    def fit(self, documents: Documents) -> AlwaysYes:
        return self

    def score(self, documents: Documents) -> np.ndarray:
        return np.ones(len(documents))


@dataclass
class RuleMethod:
    """A `FeatureRuleClassifier` with these settings."""

    name: str
    settings: Mapping[str, Any]
    classifier: FeatureRuleClassifier = field(init=False, default_factory=FeatureRuleClassifier)

    def fit(self, documents: Documents) -> RuleMethod:
        self.classifier = FeatureRuleClassifier(**self.settings)
        self.classifier.fit(documents.pooled, documents.truth)
        return self

    def score(self, documents: Documents) -> np.ndarray:
        return self.classifier.decision_function(documents.pooled)


@dataclass
class ResidualMethod:
    """Works on the mean residual of the layer that is best on held-out discovery documents."""

    name: str
    learner: str  # "probe" or "means"
    layer: int = field(init=False, default=-1)
    _model: Any = field(init=False, default=None)

    def fit(self, documents: Documents) -> ResidualMethod:
        check = np.arange(len(documents)) % PROBE_CHECK == 0
        found = {}
        for layer, x in documents.residuals.items():
            if len(documents.residuals) > 1 and _both(documents.truth, check):
                model = self._learn(x[~check], documents.truth[~check])
                says = np.asarray(model(x[check])) > 0
                found[layer] = f1_of(says, documents.truth[check])
            else:
                found[layer] = 0.0
        self.layer = max(found, key=lambda layer: (found[layer], -layer))
        self._model = self._learn(documents.residuals[self.layer], documents.truth)
        return self

    def score(self, documents: Documents) -> np.ndarray:
        return np.asarray(self._model(documents.residuals[self.layer]))

    def _learn(self, x: np.ndarray, truth: np.ndarray) -> Any:
        if self.learner == "means":
            yes, no = x[truth].mean(0), x[~truth].mean(0)
            direction = yes - no
            middle = (yes + no) @ direction / 2
            return lambda other: other @ direction - middle
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return model.fit(x, truth).decision_function


@dataclass
class TextMethod:
    """Logistic regression on TF-IDF weights of words or of character n-grams."""

    name: str
    analyzer: str  # "word" or "char"
    _model: Any = field(init=False, default=None)

    def fit(self, documents: Documents) -> TextMethod:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = {"analyzer": "word", "token_pattern": r"(?u)\w+"}
        letters = {"analyzer": "char_wb", "ngram_range": (1, 4), "max_features": 200_000}
        vectors = TfidfVectorizer(**(words if self.analyzer == "word" else letters))
        model = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
        self._model = model.fit(documents.texts, documents.truth)
        return self

    def score(self, documents: Documents) -> np.ndarray:
        return np.asarray(self._model.decision_function(documents.texts))


def baselines(residuals: bool = True) -> list[Method]:
    """The baselines that every table shows beside the rules."""
    found: list[Method] = [AlwaysYes()]
    if residuals:
        found += [
            ResidualMethod("linear probe on the residual", "probe"),
            ResidualMethod("difference of means on the residual", "means"),
        ]
    return [*found, TextMethod("bag of words", "word"), TextMethod("character n-grams", "char")]


def rule_methods(top_k: int = 2, many: int = 32, **shared: Any) -> list[RuleMethod]:
    """The paper's rule, its multi-layer form, and our other rules over the same features."""
    rows: list[dict[str, Any]] = [{"top_k": top_k}, {"top_k": 1, "n_layers": 3}]
    rows += [{"rule": rule, "top_k": many} for rule in RULES if rule != "or"]
    return [RuleMethod(name_of({**shared, **row}), {**shared, **row}) for row in rows]


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of a rule in tables, such as `OR, 2 features`."""
    full = FeatureRuleClassifier(**settings).get_params()
    kind, top_k, n_layers = full["rule"], full["top_k"], full["n_layers"]
    what = f"{NAMES[kind]}, {top_k} feature{'s' if top_k > 1 else ''}"
    return f"{what} of each of {n_layers} layers" if n_layers > 1 else what


def _both(truth: np.ndarray, check: np.ndarray) -> bool:
    """Whether both classes are on both sides of a split."""
    return all(0 < side.sum() < len(side) for side in (truth[check], truth[~check]))
