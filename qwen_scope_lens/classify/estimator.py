"""`FeatureRuleClassifier`: a rule over a few features, in scikit-learn's shape.

X is an array or CSR matrix of document maxima (one unnamed layer), a `Pooled` (named layers), or a
feature store, or several with other layers of the same documents. `feature_choice.py` selects the
features, `rules.py` fits the rules, `saved.py` writes files, `predict.py` reads texts that are in
no store, and `explain.py` gives reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from qwen_scope_lens.classify.feature_choice import rate_differences, top_features
from qwen_scope_lens.classify.pooled import Pooled, is_store, pool_layers
from qwen_scope_lens.classify.rules import RULES
from qwen_scope_lens.errors import BadPlan, StoreMismatch, TooLittleData
from qwen_scope_lens.features.pool import canonical

__all__ = ["FeatureRuleClassifier"]

MOST = float(np.finfo(np.float32).max)


class FeatureRuleClassifier(ClassifierMixin, BaseEstimator):
    """Two classes told apart by which features fire; the second of `classes_` is the positive one.

    The defaults are the paper's recipe: firing-rate differences on the discovery set, the layer
    whose best feature differs most, its `top_k` features, and yes when any of them fires anywhere.

    Parameters
    ----------
    rule : "or" (the paper's), "k-of-n", "thresholds", "logistic" or "tree".
    top_k : features taken from a layer.
    layer : "auto" (the one with the largest difference), a layer number, or several to choose from.
    n_layers : layers to take features from; the paper's multi-layer rule is `top_k=1, n_layers=m`.
    threshold : a feature fires when its largest value in the document exceeds this (0 or more).
    at_least : for "k-of-n": how many have to fire; None takes the best on the discovery set.
    C, max_depth : of the logistic regression and of the tree.
    keep : from stores, leave out first and extreme-norm tokens.
    random_state : seeds scikit-learn's logistic regression and tree.

    Attributes
    ----------
    classes_, n_features_in_ : as in scikit-learn.
    features_ : the addresses of the rule's features (column numbers for arrays).
    differences_ : their firing-rate differences. `[m]`
    layer_differences_ : the largest difference of every layer offered.
    rule_ : the learned `Rule`.   source_ : model and SAEs it belongs to; None for arrays.
    """

    def __init__(
        self,
        rule: str = "or",
        *,
        top_k: int = 2,
        layer: str | int | Sequence[int] = "auto",
        n_layers: int = 1,
        threshold: float = 0.0,
        at_least: int | None = None,
        C: float = 1.0,
        max_depth: int = 3,
        keep: bool = True,
        random_state: int | None = 0,
    ) -> None:
        self.rule = rule
        self.top_k = top_k
        self.layer = layer
        self.n_layers = n_layers
        self.threshold = threshold
        self.at_least = at_least
        self.C = C
        self.max_depth = max_depth
        self.keep = keep
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> FeatureRuleClassifier:
        """Learn the rule. With a store, y may be the name of one of its labels."""
        self._check_settings()
        pooled, matrix, y = self._training_data(X, y)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        classes = np.unique(y)
        if kind != "binary" and len(classes) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}: give"
                " y as `labels == 'one of them'`, or wrap the classifier in OneVsRestClassifier"
            )
        if len(classes) < 2:
            raise TooLittleData(
                f"y has only one class, {classes[0]!r}: a classifier needs documents of two classes"
            )
        truth = y == classes[1]
        self.classes_ = classes
        return self._learn(pooled, matrix, truth, rate_differences(matrix, truth, self.threshold))

    @classmethod
    def of_every_layer(
        cls, X: Pooled, truth: np.ndarray, settings: Mapping[str, Any]
    ) -> dict[int, FeatureRuleClassifier]:
        """One classifier a layer, as `fit` with `layer=n` makes each, in one pass over X."""
        found = {}
        differences: np.ndarray | None = None
        for facts in X.source.layers:
            one = cls(**{**settings, "layer": facts.layer})
            one._check_settings()
            if differences is None:
                differences = rate_differences(X.matrix, truth, one.threshold)
            one.classes_ = np.array([False, True])
            found[facts.layer] = one._learn(X, X.matrix, truth, differences)
        return found

    def _learn(
        self, pooled: Pooled | None, matrix: Any, truth: np.ndarray, differences: np.ndarray
    ) -> FeatureRuleClassifier:
        """Choose features by their differences, and learn the rule."""
        offsets = pooled.offsets if pooled else np.array([0, matrix.shape[1]])
        choice = top_features(
            differences,
            offsets,
            self.top_k,
            self._layers_allowed(pooled),
            self.n_layers,
            either_sign=self.rule in ("logistic", "tree"),
        )
        values = matrix[:, choice.columns].toarray()
        if self.rule == "k-of-n" and self.at_least and self.at_least > len(choice.columns):
            raise TooLittleData(self._too_few(len(choice.columns)))
        rule = RULES[self.rule](values, truth, self.get_params(deep=False))
        needed = rule.needed()
        self.task_: dict[str, Any] = {}  # what was asked, where the command line asked it
        self.rule_ = rule.take(needed)
        columns = choice.columns[needed]
        self.differences_ = choice.differences[needed]
        if pooled is None:
            self.features_: tuple[Any, ...] = tuple(columns.tolist())
            self.layer_differences_ = {0: float(choice.best_by_layer[0])}
            self.source_ = None
        else:
            self.features_ = tuple(pooled.address(int(column)) for column in columns)
            numbers = [facts.layer for facts in pooled.source.layers]
            self.layer_differences_ = dict(zip(numbers, choice.best_by_layer.tolist(), strict=True))
            self.source_ = pooled.source.only(sorted(choice.layers))
            self.n_features_in_ = matrix.shape[1]
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """How clearly each document is of the positive class; above 0 means yes. `[n]`"""
        return self.rule_score(self.values(X))

    def predict(self, X: Any) -> np.ndarray:
        """The class of every document. `[n]`"""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    def values(self, X: Any) -> np.ndarray:
        """The documents' largest values of the rule's features. `[n, m]`"""
        check_is_fitted(self)
        if self.source_ is None:
            if isinstance(X, Pooled) or is_store(X):
                raise StoreMismatch(
                    "the classifier was fitted on a plain array, which does not say whose features"
                    " its columns are: fit it on a store to use it on stores"
                )
            X = validate_data(self, X, accept_sparse="csr", reset=False)
            columns = X[:, list(self.features_)]  # toarray() sums what a cell holds several times
            return columns.toarray() if hasattr(columns, "toarray") else np.asarray(columns)
        if not isinstance(X, Pooled):
            if not is_store(X) and not _are_stores(X):
                raise StoreMismatch(
                    f"the classifier was fitted on {', '.join(f.ref for f in self.source_.layers)};"
                    f" found {type(X).__name__}, which does not say whose features it holds: give"
                    " a store or what pool_layers() makes of one"
                )
            have = set(X.layers) if is_store(X) else {n for store in X for n in store.layers}
            wanted = [n for n in (f.layer for f in self.source_.layers) if n in have]
            X = pool_layers(X, wanted or None, keep=self.source_.keep)  # none: refused below
        self.source_.check_same(X.source, "the data")
        return X.matrix[:, [X.column(address) for address in self.features_]].toarray()

    def rule_score(self, values: np.ndarray) -> np.ndarray:
        """`decision_function` of values that are already there. `[n, m] -> [n]`"""
        check_is_fitted(self)
        return self.rule_.score(values)

    def explain(self, doc: Any, source: Any = None, labels: Any = None) -> Any:
        """Why: the features that count, with token, position, value, and label if known.

        `doc` is a document's number in the store `source`, or a text; for a text `source` is a
        reader (`read.open_reader`), opened for the fitted model where None. `labels` is a
        LabelPack.
        """
        from qwen_scope_lens.classify.explain import explain

        check_is_fitted(self)
        return explain(self, doc, source, labels)

    def save(self, path: str | Path) -> Path:
        """Write the classifier as JSON: no pickle, nothing is run when it is read."""
        from qwen_scope_lens.classify.saved import save_classifier

        check_is_fitted(self)
        return save_classifier(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> FeatureRuleClassifier:
        """Read what `save` wrote."""
        from qwen_scope_lens.classify.saved import load_classifier

        return load_classifier(Path(path), FeatureRuleClassifier)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_class = False
        # Rules that ask whether features fire cannot tell blobs apart whose values lie below zero.
        tags.classifier_tags.poor_score = self.rule not in ("logistic", "tree")
        return tags

    def _training_data(self, X: Any, y: Any) -> tuple[Pooled | None, Any, np.ndarray]:
        """The documents with a label: named layers if there are any, the matrix, and y."""
        if is_store(X) or _are_stores(X):
            if isinstance(y, str):
                y = (X if is_store(X) else X[0]).labels(y)
            known = np.array([label is not None for label in y], dtype=bool)
            layers = None if self.layer == "auto" else self._layer_numbers()
            X = pool_layers(X, layers, self.keep, None if known.all() else np.nonzero(known)[0])
            y = _plain(np.asarray(y, dtype=object)[known])
        if isinstance(X, Pooled):
            y = np.asarray(y)
            check_consistent_length(X, y)
            return X, X.matrix, y
        X, y = validate_data(self, X, y, accept_sparse="csr")
        return None, canonical(X), y

    def _layers_allowed(self, pooled: Pooled | None) -> list[int]:
        """Positions of the layers that the rule may come from."""
        if self.layer == "auto":
            return list(range(len(pooled.source.layers) if pooled else 1))
        if pooled is None:
            raise BadPlan(
                f"layer={self.layer!r}: a plain array is one layer without a number; leave"
                ' layer="auto", or fit on a store'
            )
        return [pooled.position(number) for number in self._layer_numbers()]

    def _layer_numbers(self) -> list[int]:
        layers = [self.layer] if isinstance(self.layer, (int, np.integer)) else self.layer
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise BadPlan(f'layer={self.layer!r}: expected "auto", a layer number or several')
        return [int(number) for number in layers]

    def _too_few(self, usable: int) -> str:
        """Why `at_least` cannot be reached, and which setting changes that."""
        wanted, layers = self.top_k * self.n_layers, f"{self.n_layers} layer"
        layers += "s" if self.n_layers > 1 else ""
        if usable >= wanted:
            return (
                f"at_least={self.at_least} of {usable} features: take more features (top_k, now"
                f" {self.top_k} of each of {layers}), or set at_least to {usable} or less"
            )
        return (
            f"at_least={self.at_least}, but of the {wanted} features asked for (top_k={self.top_k},"
            f" {layers}) only {usable} {'is' if usable == 1 else 'are'} usable: no other fires on a"
            " larger share of the positive documents than of the others, so a larger top_k finds"
            f" none either. Set at_least to {usable}, take another layer or more of them (layer,"
            " n_layers), lower the threshold, or add documents"
        )

    def _check_settings(self) -> None:
        if self.rule not in RULES:
            raise BadPlan(f"rule={self.rule!r}: expected one of {', '.join(RULES)}")
        for name in ("top_k", "n_layers", "max_depth", "at_least"):
            value = getattr(self, name)
            if name == "at_least" and value is None:
                continue
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise BadPlan(f"{name}={value!r}: expected a whole number from 1")
        if not 0 <= self.threshold <= MOST:
            raise BadPlan(
                f"threshold={self.threshold!r}: expected 0 or more, a value that a feature can have"
            )


def _are_stores(X: Any) -> bool:
    return isinstance(X, (list, tuple)) and len(X) > 0 and all(map(is_store, X))


def _plain(labels: np.ndarray) -> np.ndarray:
    """Labels of a store, in the narrowest dtype that scikit-learn knows."""
    return np.array(labels.tolist())
