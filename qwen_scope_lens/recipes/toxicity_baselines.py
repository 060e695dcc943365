"""What the rules of `toxicity` are compared with: classifiers of texts, and of mean residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_scope_lens.classify.experiments import subset
from qwen_scope_lens.classify.methods import AlwaysYes, Documents, Method, baselines
from qwen_scope_lens.classify.rules import f1_of
from qwen_scope_lens.classify.scores import Scores, macro
from qwen_scope_lens.stats import Interval

__all__ = ["baselines_f1", "interval", "learners", "less"]


def baselines_f1(
    discovery: Mapping[str, Documents], test: Mapping[str, Documents]
) -> dict[str, Interval]:
    """Mean F1 over languages: always yes, words, character n-grams and, with residuals, probes."""
    found = {}
    for method in baselines(residuals=_with_residuals(discovery)):
        decisions = []
        for language, known in discovery.items():
            scores = method.fit(known).score(test[language])
            decisions.append((scores > 0, test[language].truth))
        found[method.name] = macro(decisions)
    return found


def learners(documents: Documents) -> list[Method]:
    """The baselines that learn: those on texts and, where residuals were read, on residuals."""
    found = baselines(residuals=bool(documents.residuals))
    return [method for method in found if not isinstance(method, AlwaysYes)]


def less(
    discovery: Mapping[str, Documents],
    test: Mapping[str, Documents],
    share: float,
    draws: Sequence[int],
) -> dict[str, Any]:
    """F1 with a share of the discovery texts: mean over languages, then over draws (seeds)."""
    found: dict[str, Any] = {}
    for method in learners(next(iter(discovery.values()))):
        full = np.mean([_f1(method, known, test[name]) for name, known in discovery.items()])
        means = [
            np.mean(
                [
                    _f1(method, subset(known, share, seed), test[name])
                    for name, known in discovery.items()
                ]
            )
            for seed in draws
        ]
        value, whole = float(np.mean(means)), max(float(full), 1e-12)
        of_full = {
            "value": value / whole,
            "low": float(min(means)) / whole,
            "high": float(max(means)) / whole,
        }
        found[method.name] = {"f1": value, "all": float(full), "of full": of_full}
    return found


def interval(scores: Scores) -> dict[str, float]:
    return {"value": scores.f1, "low": scores.low, "high": scores.high}


def _f1(method: Method, known: Documents, test: Documents) -> float:
    return f1_of(method.fit(known).score(test) > 0, test.truth)


def _with_residuals(documents: Mapping[str, Documents]) -> bool:
    return bool(next(iter(documents.values())).residuals)
