"""All methods on the same documents: fitted on discovery, scored on test, side by side.

Fills a `Report`; how it looks is `report.py`. Experiments over languages, layers and amounts of
data are `experiments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedKFold

from qwen_scope_lens.classification.methods import (
    Documents,
    Method,
    RuleMethod,
    baselines,
    rules,
)
from qwen_scope_lens.classification.scores import At, Scores, cut_for, difference, scored
from qwen_scope_lens.errors import TooLittleData

__all__ = ["Error", "Growth", "Point", "Report", "Row", "compare"]

GROWTH = (1, 2, 5, 10, 16, 32)
FOLDS = 3


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
    features: tuple[tuple[str, float], ...]  # address, value; none for most misses
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
) -> Report:
    """Fit every method on `discovery`, score it on `test`.

    `classifier` is the one reported on, the paper's OR over two features where None.
    """
    for name, part in (("discovery", discovery), ("test", test)):
        if not 0 < part.truth.sum() < len(part.truth):
            raise TooLittleData(
                f"the {name} documents are all {'positive' if part.truth.all() else 'negative'}:"
                " documents of both classes are needed"
            )
    at = at or At("precision", 0.9)
    others = rules()
    first = classifier or others[0]
    methods: list[Method] = [first, *(m for m in others if m.name != first.name)]
    methods += baselines(residuals=bool(discovery.residuals))
    languages = tuple(sorted(set(map(str, test.languages)))) if test.languages is not None else ()
    decisions: dict[str, np.ndarray] = {}
    rows = []
    for method in methods:
        cut = _cut(method, discovery, at)
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
                None if cut is None else _point(scores > cut, test.truth),
            )
        )
    fitted = first.classifier
    return Report(
        tuple(rows),
        tuple(grow(discovery, test, growth, dict(first.settings))),
        tuple(_errors(first, test, most_errors)),
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


def _cut(method: Method, discovery: Documents, at: At) -> float | None:
    """The operating point's cut, from scores of discovery documents that were held out."""
    least = min(int(discovery.truth.sum()), int((~discovery.truth).sum()))
    if least < FOLDS:
        return None
    held = np.zeros(len(discovery))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for known, left in folds.split(discovery.truth, discovery.truth):
        held[left] = method.fit(discovery.take(known)).score(discovery.take(left))
    return cut_for(held, discovery.truth, at)


def _point(says: np.ndarray, truth: np.ndarray) -> Point:
    scores = scored(says, truth)
    return Point(scores.precision, scores.recall, float(says.mean()))


def _errors(method: RuleMethod, test: Documents, most: int) -> list[Error]:
    """False alarms and misses in turn, the clearest first."""
    fitted = method.classifier
    values = fitted.values(test.pooled)
    scores = fitted.rule_score(values)
    alarms = [i for i in np.argsort(-scores, kind="stable") if scores[i] > 0 and not test.truth[i]]
    misses = [i for i in np.argsort(scores, kind="stable") if scores[i] <= 0 and test.truth[i]]
    chosen = alarms[: most // 2] + misses[: most // 2]
    return [
        Error(
            int(test.pooled.docs[i]),
            test.texts[i],
            bool(test.truth[i]),
            float(scores[i]),
            tuple(
                (str(fitted.features_[at]), float(values[i, at]))
                for at in fitted.rule_.responsible(values[i])
            ),
            None if test.languages is None else str(test.languages[i]),
        )
        for i in chosen
    ]
