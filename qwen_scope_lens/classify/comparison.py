"""Compare all methods on the same documents: fitted on discovery, scored on test.

`compare` fills a `Report`, and `report.py` shows it. Experiments over languages, layers and amounts
of data are in `experiments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedKFold

from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
from qwen_scope_lens.classify.explain import Explanation
from qwen_scope_lens.classify.methods import (
    Documents,
    Method,
    RuleMethod,
    baselines,
    rule_methods,
)
from qwen_scope_lens.classify.scores import At, Scores, cut_for, difference, scored
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.stats import Interval

__all__ = ["Error", "Growth", "Point", "Report", "Row", "compare"]

Why = Callable[[FeatureRuleClassifier, int], Explanation]
GROWTH = (1, 2, 5, 10, 16, 32)
HELD_OUT = 3
"""One of this many discovery documents is held out to set the cut of the operating point."""


@dataclass(frozen=True)
class Point:
    """Precision and recall on the test documents, with the cut set on discovery documents."""

    precision: float
    recall: float
    share: float  # of the test documents that are called positive


@dataclass(frozen=True)
class Row:
    """One method on all test documents, on each language, and at the operating point."""

    method: str
    all: Scores
    by_language: dict[str, Scores]
    against: Interval | None  # F1 minus the F1 of the first method; None for the first method
    point: Point | None  # None if no cut reaches it on the discovery documents


@dataclass(frozen=True)
class Growth:
    """One rule with more and more features."""

    rule: str
    top_k: tuple[int, ...]
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Error:
    """A test document that the first method got wrong, with the features behind its score."""

    doc: int
    text: str
    truth: bool
    score: float
    features: tuple[str, ...]  # address, value and token if known; empty for most misses
    language: str | None = None


@dataclass(frozen=True)
class Report:
    """The content of a report. The first row is the classifier that the report is about."""

    rows: tuple[Row, ...]
    growth: tuple[Growth, ...]
    errors: tuple[Error, ...]
    at: At
    n_discovery: int
    n_test: int
    features: tuple[tuple[str, float], ...]  # address and Δ of the classifier's features
    layers: dict[int, float]  # d per layer
    languages: tuple[str, ...]
    described: str


def compare(
    discovery: Documents,
    test: Documents,
    classifier: RuleMethod | None = None,
    at: At | None = None,
    growth: Sequence[int] = GROWTH,
    most_errors: int = 20,
    described: str = "",
    why: Why | None = None,
) -> Report:
    """Fit every method on `discovery` and score it on `test`.

    `classifier` is the one that the report is about; by default the paper's OR over two features.
    `why(classifier, document number)` explains a test document, so that errors name tokens.
    """
    for name, part in (("discovery", discovery), ("test", test)):
        if not 0 < part.truth.sum() < len(part.truth):
            raise TooLittleData(
                f"the {name} documents are all {'positive' if part.truth.all() else 'negative'}:"
                " expected documents of both classes"
            )
    at = at or At("precision", 0.9)
    others = rule_methods()
    first = classifier or others[0]
    methods: list[Method] = [first, *(m for m in others if m.name != first.name)]
    methods += baselines(residuals=bool(discovery.residuals))
    languages = tuple(sorted(set(map(str, test.languages)))) if test.languages is not None else ()
    decisions: dict[str, np.ndarray] = {}
    rows = []
    for method in methods:
        point = _at_point(method, discovery, test, at)
        scores = method.fit(discovery).score(test)
        decisions[method.name] = says = scores > 0
        known = test.languages
        by_language = {
            name: scored(says[known == name], test.truth[known == name])
            for name in languages
            if known is not None
        }
        against = difference(says, decisions[first.name], test.truth) if decisions else None
        rows.append(
            Row(
                method.name,
                scored(says, test.truth),
                by_language,
                None if method is first else against,
                point,
            )
        )
    fitted = first.classifier
    return Report(
        tuple(rows),
        tuple(grow(discovery, test, growth, dict(first.settings))),
        tuple(_errors(first, test, most_errors, why)),
        at,
        len(discovery),
        len(test),
        tuple(zip(map(str, fitted.features_), fitted.differences_.tolist(), strict=True)),
        dict(fitted.layer_differences_),
        languages,
        described,
    )


def grow(
    discovery: Documents, test: Documents, sizes: Sequence[int], settings: dict[str, object]
) -> list[Growth]:
    """OR, k-of-n and own thresholds over the same best 1, 2, 5, ... features."""
    found = []
    for rule in ("or", "k-of-n", "thresholds"):
        scores = []
        for top_k in sizes:
            changed = {**settings, "rule": rule, "top_k": top_k, "at_least": None}
            method = RuleMethod(rule, changed).fit(discovery)
            scores.append(scored(method.score(test) > 0, test.truth))
        found.append(Growth(rule, tuple(sizes), tuple(scores)))
    return found


def _at_point(method: Method, discovery: Documents, test: Documents, at: At) -> Point | None:
    """Fit on two thirds of the discovery documents, set the cut on the rest, then score on test.

    The same fit gives all scores, because scores of fits on different layers are not comparable.
    """
    least = min(int(discovery.truth.sum()), int((~discovery.truth).sum()))
    if least < HELD_OUT:
        return None
    folds = StratifiedKFold(HELD_OUT, shuffle=True, random_state=0)
    known, left = next(folds.split(discovery.truth, discovery.truth))
    held = discovery.take(left)
    fitted = method.fit(discovery.take(known))
    cut = cut_for(fitted.score(held), held.truth, at)
    if cut is None:
        return None
    says = fitted.score(test) > cut
    scores = scored(says, test.truth)
    return Point(scores.precision, scores.recall, float(says.mean()))


def _errors(method: RuleMethod, test: Documents, most: int, why: Why | None) -> list[Error]:
    """False alarms and then misses, each with the most extreme scores first."""
    fitted = method.classifier
    values = fitted.values(test.pooled)
    scores = fitted.rule_score(values)
    alarms = [i for i in np.argsort(-scores, kind="stable") if scores[i] > 0 and not test.truth[i]]
    misses = [i for i in np.argsort(scores, kind="stable") if scores[i] <= 0 and test.truth[i]]
    chosen = alarms[: most // 2] + misses[: most // 2]
    found = []
    for i in chosen:
        places: dict[str, str] = {}
        for one in why(fitted, int(test.pooled.docs[i])).evidence if why else ():
            label = f" ({one.label})" if one.label else ""
            places.setdefault(one.feature, f" on {one.token!r}, token {one.position}{label}")
        error = Error(
            int(test.pooled.docs[i]),
            test.texts[i],
            bool(test.truth[i]),
            float(scores[i]),
            tuple(
                f"{fitted.features_[at]} {values[i, at]:.2f}{places.get(fitted.features_[at], '')}"
                for at in fitted.rule_.responsible(values[i])
            ),
            None if test.languages is None else str(test.languages[i]),
        )
        found.append(error)
    return found
