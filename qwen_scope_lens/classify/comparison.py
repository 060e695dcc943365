"""All methods on the same documents: fitted on discovery, scored on test, side by side.

Fills a `Report`; how it looks is `report.py`. Experiments over languages, layers and amounts of
data are `experiments.py`.
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

__all__ = ["Error", "Growth", "Point", "Report", "Row", "compare"]

Why = Callable[[FeatureRuleClassifier, int], Explanation]
GROWTH = (1, 2, 5, 10, 16, 32)
HELD_OUT = 3
"""One discovery document in this many sets the cut of the operating point."""


@dataclass(frozen=True)
class Point:
    """Precision and recall on test where the cut was set on discovery documents."""

    precision: float
    recall: float
    share: float  # of the documents that are called positive


@dataclass(frozen=True)
class Row:
    """One method: on all test documents, on each language's, and at the operating point."""

    method: str
    all: Scores
    by_language: dict[str, Scores]
    against: tuple[float, float, float] | None  # F1 less that of the first method, low, high
    point: Point | None  # None where no cut reaches it on the discovery documents


@dataclass(frozen=True)
class Growth:
    """One rule with more and more features."""

    rule: str
    top_k: tuple[int, ...]
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Error:
    """A test document that the first method got wrong, with the features that speak."""

    doc: int
    text: str
    truth: bool
    score: float
    features: tuple[str, ...]  # address, value, where it fires if known; none for most misses
    language: str | None = None


@dataclass(frozen=True)
class Report:
    """What `report.py` shows. The first row is the classifier that is reported on."""

    rows: tuple[Row, ...]
    growth: tuple[Growth, ...]
    errors: tuple[Error, ...]
    at: At
    n_discovery: int
    n_test: int
    features: tuple[tuple[str, float], ...]  # of the classifier: address, Δ
    layers: dict[int, float]  # d of every layer
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
    """Fit every method on `discovery`, score it on `test`.

    `classifier` is the one reported on, the paper's OR over two features where None. `why` explains
    a test document's number, so that errors name tokens.
    """
    for name, part in (("discovery", discovery), ("test", test)):
        if not 0 < part.truth.sum() < len(part.truth):
            raise TooLittleData(
                f"the {name} documents are all {'positive' if part.truth.all() else 'negative'}:"
                " documents of both classes are needed"
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
    """OR, k-of-n and own thresholds over the same 1, 2, 5, ... features."""
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
    """Fitted on two thirds of the discovery documents, the cut set on the rest, then on test.

    One fit throughout: scores of different fits, perhaps on different layers, have no common scale.
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
    """False alarms and misses in turn, the clearest first."""
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
