"""`FeatureRuleClassifier`: a rule over a few features, as a scikit-learn classifier.

X is an array or CSR matrix of document maxima (one unnamed layer), a `Pooled` (named layers), a
feature store, or several stores with different layers of the same documents. `feature_choice.py`
selects the features and `rules.py` learns the rule; the result is a frozen `FittedRule`
(`fitted.py`). `predict.py` reads texts that are not in a store, and `explain.py` gives reasons.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from qwen_scope_lens.classify.feature_choice import rate_differences, top_features
from qwen_scope_lens.classify.fitted import FittedRule, damaged, load_fitted
from qwen_scope_lens.classify.pooled import Pooled, Source, is_store, pool_layers
from qwen_scope_lens.classify.rules import RULES, Rule
from qwen_scope_lens.errors import BadPlan, StoreMismatch, TooLittleData
from qwen_scope_lens.features.pool import canonical

__all__ = ["FeatureRuleClassifier"]

MOST = float(np.finfo(np.float32).max)


class FeatureRuleClassifier(ClassifierMixin, BaseEstimator):
    """Separates two classes by the features that fire; the second of `classes_` is positive.

    The defaults follow the paper: compute firing-rate differences on the discovery set, take the
    layer whose best feature has the largest difference and its `top_k` features, and say yes if
    any of them fires anywhere.

    Parameters
    ----------
    rule : "or" (the paper's), "k-of-n", "thresholds", "logistic" or "tree".
    top_k : number of features per layer.
    layer : "auto" (the layer with the largest difference), a layer number, or several numbers to
        choose from.
    n_layers : number of layers to take features from; the paper's multi-layer rule is
        `top_k=1, n_layers=m`.
    threshold : a feature fires if its largest value in the document exceeds this (0 or more).
    at_least : for "k-of-n": how many features have to fire; None takes the best number on the
        discovery set.
    C, max_depth : settings of the logistic regression and of the tree.
    keep : for stores, leave out first and extreme-norm tokens.
    random_state : seed of scikit-learn's logistic regression and tree.

    Attributes
    ----------
    classes_, n_features_in_ : as in scikit-learn.
    fitted_ : the `FittedRule`, of which the following attributes are parts.
    features_ : the addresses of the rule's features (column numbers for arrays).
    differences_ : the firing-rate differences of the features. `[m]`
    layer_differences_ : the largest difference of every layer.
    rule_ : the learned `Rule`.
    source_ : the model and SAEs that it belongs to; None for arrays.
    """

    fitted_: FittedRule

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

    @property
    def classes_(self) -> np.ndarray:
        return self.fitted_.classes

    @property
    def features_(self) -> tuple[Any, ...]:
        return self.fitted_.features

    @property
    def differences_(self) -> np.ndarray:
        return self.fitted_.differences

    @property
    def layer_differences_(self) -> Mapping[int, float]:
        return self.fitted_.layer_differences

    @property
    def rule_(self) -> Rule:
        return self.fitted_.rule

    @property
    def source_(self) -> Source | None:
        return self.fitted_.source

    def fit(self, X: Any, y: Any) -> FeatureRuleClassifier:
        """Learn the rule. If X is a store, y may be the name of one of its labels."""
        self._check_settings()
        pooled, matrix, y = self._training_data(X, y)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        classes = np.unique(y)
        if kind != "binary" and len(classes) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}: pass"
                " `labels == 'one of them'` as y, or wrap the classifier in OneVsRestClassifier"
            )
        if len(classes) < 2:
            raise TooLittleData(
                f"y has only one class, {classes[0]!r}: expected documents of two classes"
            )
        truth = y == classes[1]
        differences = rate_differences(matrix, truth, self.threshold)
        return self._learn(pooled, matrix, truth, differences, classes)

    @classmethod
    def of_every_layer(
        cls, X: Pooled, truth: np.ndarray, settings: Mapping[str, Any]
    ) -> dict[int, FeatureRuleClassifier]:
        """One classifier per layer, each equal to a fit with `layer=n`, in one pass over X."""
        found = {}
        differences: np.ndarray | None = None
        for facts in X.source.layers:
            one = cls(**{**settings, "layer": facts.layer})
            one._check_settings()
            if differences is None:
                differences = rate_differences(X.matrix, truth, one.threshold)
            found[facts.layer] = one._learn(
                X, X.matrix, truth, differences, np.array([False, True])
            )
        return found

    def _learn(
        self,
        pooled: Pooled | None,
        matrix: Any,
        truth: np.ndarray,
        differences: np.ndarray,
        classes: np.ndarray,
    ) -> FeatureRuleClassifier:
        """Choose features by their differences and learn the rule over them."""
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
        columns = choice.columns[needed]
        self.task_: dict[str, Any] = {}  # the question, if the command line asked it
        if pooled is None:
            features, numbers, source = tuple(columns.tolist()), [0], None
        else:
            features = tuple(pooled.address(int(column)) for column in columns)
            numbers = [facts.layer for facts in pooled.source.layers]
            source = pooled.source.only(sorted(choice.layers))
            self.n_features_in_ = matrix.shape[1]
        self.fitted_ = FittedRule(
            classes=classes,
            rule=rule.take(needed),
            features=features,
            differences=choice.differences[needed],
            layer_differences=dict(zip(numbers, choice.best_by_layer.tolist(), strict=True)),
            source=source,
            tokens=None if pooled is None else _lengths(pooled.tokens),
        )
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The score of each document; above 0 means the positive class. `-> [n]`"""
        return self.rule_score(self.values(X))

    def predict(self, X: Any) -> np.ndarray:
        """The class of each document. `-> [n]`"""
        check_is_fitted(self)
        return self.fitted_.predicted(self.decision_function(X))

    def values(self, X: Any) -> np.ndarray:
        """The largest value of each of the rule's features in each document. `-> [n, m]`"""
        check_is_fitted(self)
        if self.source_ is None:
            if isinstance(X, Pooled) or is_store(X):
                raise StoreMismatch(
                    "the classifier was fitted on a plain array, which does not say whose features"
                    " its columns are. Fit it on a store to use it on stores"
                )
            X = validate_data(self, X, accept_sparse="csr", reset=False)
            columns = X[
                :, list(self.features_)
            ]  # toarray() sums cells that are stored several times
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
            X = pool_layers(X, wanted or None, keep=self.source_.keep)  # if none: refused below
        self.source_.check_same(X.source, "the data")
        if said := self.fitted_.shorter(X.tokens):
            warnings.warn(said, UserWarning, stacklevel=3)
        return X.matrix[:, [X.column(address) for address in self.features_]].toarray()

    def rule_score(self, values: np.ndarray) -> np.ndarray:
        """`decision_function` of values that are already known. `[n, m] -> [n]`"""
        check_is_fitted(self)
        return self.rule_.score(values)

    def explain(self, doc: Any, source: Any = None, labels: Any = None) -> Any:
        """Explain a decision: the features behind it, with token, position, value and label.

        `doc` is the number of a document in the store `source`, or a text. For a text, `source` is
        a reader (`classify.open_reader`); by default one is opened for the fitted model. `labels`
        is a `LabelPack`.
        """
        from qwen_scope_lens.classify.explain import explain

        check_is_fitted(self)
        return explain(self.fitted_, doc, source, labels)

    def save(self, path: str | Path) -> Path:
        """Write the classifier as JSON, without pickle: reading the file runs no code."""
        check_is_fitted(self)
        settings = self.get_params(deep=False)
        return self.fitted_.save(Path(path), settings, self.task_, self.n_features_in_)

    @staticmethod
    def load(path: str | Path) -> FeatureRuleClassifier:
        """Read a file that `save` wrote."""
        fitted, content = load_fitted(Path(path))
        try:
            found = FeatureRuleClassifier(**content["settings"])
        except TypeError as error:  # unknown settings
            raise damaged(Path(path), error) from error
        found.fitted_, found.task_ = fitted, content["task"]
        found.n_features_in_ = content["n_features_in"]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_class = False
        # Rules on firing features cannot separate scikit-learn's blobs, whose values are negative.
        tags.classifier_tags.poor_score = self.rule not in ("logistic", "tree")
        return tags

    def _training_data(self, X: Any, y: Any) -> tuple[Pooled | None, Any, np.ndarray]:
        """The documents that have a label: pooled layers if they have names, the matrix, and y."""
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
        """Positions of the layers from which features may be chosen."""
        if self.layer == "auto":
            return list(range(len(pooled.source.layers) if pooled else 1))
        if pooled is None:
            raise BadPlan(
                f"layer={self.layer!r}: a plain array is one layer without a number. Keep"
                ' layer="auto", or fit on a store'
            )
        return [pooled.position(number) for number in self._layer_numbers()]

    def _layer_numbers(self) -> list[int]:
        layers = [self.layer] if isinstance(self.layer, (int, np.integer)) else self.layer
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise BadPlan(
                f'layer={self.layer!r}: expected "auto", a layer number or several numbers'
            )
        return [int(number) for number in layers]

    def _too_few(self, usable: int) -> str:
        """The message that says why `at_least` cannot be reached, and what to change."""
        wanted, layers = self.top_k * self.n_layers, f"{self.n_layers} layer"
        layers += "s" if self.n_layers > 1 else ""
        if usable >= wanted:
            return (
                f"at_least={self.at_least} of {usable} features: take more features (top_k, now"
                f" {self.top_k} of each of {layers}), or set at_least to {usable} or less"
            )
        return (
            f"at_least={self.at_least}, but of the {wanted} features asked for (top_k={self.top_k},"
            f" {layers}) only {usable} {'is' if usable == 1 else 'are'} usable. No other feature"
            " fires on a larger share of the positive documents than of the others, so a larger"
            f" top_k finds no more. Set at_least to {usable}, take another layer or more layers"
            " (layer, n_layers), lower the threshold, or add documents"
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
                f"threshold={self.threshold!r}: expected 0 to {MOST:.3g}, the range of float32"
            )


def _are_stores(X: Any) -> bool:
    return isinstance(X, (list, tuple)) and len(X) > 0 and all(map(is_store, X))


def _lengths(tokens: np.ndarray | None) -> tuple[float, float] | None:
    """The number that 95% of documents have at least, and the median."""
    if tokens is None:
        return None
    least, median = np.quantile(tokens, [0.05, 0.5])
    return float(least), float(median)


def _plain(labels: np.ndarray) -> np.ndarray:
    """Labels of a store as an array whose dtype scikit-learn knows."""
    return np.array(labels.tolist())
