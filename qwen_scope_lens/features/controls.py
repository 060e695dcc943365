"""What a ranking has to be compared with: shuffled labels, other features, and probes.

Every figure is measured on documents that the ranking did not see, except for the shuffles, which
repeat the ranking itself on labels that mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.features.contrast import Contrast, RankSums, q_values

if TYPE_CHECKING:
    from qwen_scope_lens.features.contrast import Correction

__all__ = [
    "Baseline",
    "Probe",
    "Shuffles",
    "baseline",
    "matched",
    "oriented",
    "probes",
    "shuffled_tests",
    "summarise_shuffles",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shuffles:
    """The same ranking repeated on shuffled labels."""

    found: tuple[int, ...]  # features that passed, in each run
    largest_auroc: tuple[float, ...]  # the best feature of each run, turned to its better side

    @property
    def ceiling(self) -> float:
        """The highest AUROC that any feature reached on labels that mean nothing."""
        return max(self.largest_auroc, default=0.5)


@dataclass(frozen=True)
class Baseline:
    """Held-out AUROCs of some features, each turned to the side that it had in discovery."""

    name: str
    features: int
    mean_auroc: float | None  # None where there are no features
    highest_auroc: float | None


@dataclass(frozen=True)
class Probe:
    """A direction fitted on the discovery documents, and its AUROC on the held-out ones."""

    name: str  # "difference of means" or "linear probe"
    on: str  # "features" or "residual"
    layer: int
    auroc: float


def shuffled_tests(sums: RankSums, positive: Array, runs: int, seed: int) -> tuple[Array, Array]:
    """AUROC and p-value of every feature on shuffled labels: `[d_sae, runs]` each.

    The permutations depend on the seed alone, so that they are the same for all layers.
    """
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(positive) for _ in range(runs)], axis=1)
    return sums.test(labels)


def summarise_shuffles(
    auroc: Array, p: Array, tested: Array, fdr: float, correction: Correction
) -> Shuffles:
    """Summarise `[n_features, runs]` of all layers together, over the features that were tested."""
    found, largest = [], []
    for run in range(p.shape[1]):
        found.append(int((q_values(p[:, run], tested, correction) <= fdr).sum()))
        sides = np.abs(auroc[tested, run] - 0.5)
        largest.append(0.5 + float(sides.max(initial=0.0)))
    return Shuffles(tuple(found), tuple(largest))


def oriented(discovery: Array, held_out: Array) -> Array:
    """Held-out AUROCs, turned where discovery found the feature higher in the negatives."""
    return np.where(discovery >= 0.5, held_out, 1 - held_out)


def baseline(name: str, features: Array, discovery: Array, held_out: Array) -> Baseline:
    """The held-out AUROCs of some features (by number), summarised."""
    if not len(features):
        return Baseline(name, 0, None, None)
    scores = oriented(discovery[features], held_out[features])
    return Baseline(name, len(features), float(scores.mean()), float(scores.max()))


def matched(winners: Array, others: Array, found: Contrast, each: int = 3) -> Array:
    """For every winner, the `each` other features that fire most nearly as often and as strongly.

    Which group they fire in does not count. Returns indices of features; one feature may match
    several winners.
    """
    from scipy.spatial import cKDTree

    if not len(winners) or not len(others):
        return np.zeros(0, dtype=np.int64)
    n = found.n_positive + found.n_negative
    share = found.documents / n
    mean = (found.n_positive * found.mean_positive + found.n_negative * found.mean_negative) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = np.where(share > 0, mean / share, 0.0)
    place = np.stack([np.log(share + 1 / n), np.log(strength + 1e-12)], axis=1)
    spread = place[others].std(0)
    place = place / np.where(spread > 0, spread, 1)
    _, near = cKDTree(place[others]).query(place[winners], k=min(each, len(others)))
    return np.unique(others[np.asarray(near).ravel()])


def probes(
    x: Any, positive: Array, discovery: Array, held_out: Array, on: str, layer: int
) -> list[Probe]:
    """The difference of means and a logistic regression on `x [n, d]` (dense or sparse)."""
    import warnings

    from scipy.sparse import issparse
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, new = x[np.flatnonzero(discovery)], x[np.flatnonzero(held_out)]
    labels, truth = positive[discovery], positive[held_out]
    direction = np.asarray(known[np.flatnonzero(labels)].mean(0)).ravel() - (
        np.asarray(known[np.flatnonzero(~labels)].mean(0)).ravel()
    )
    probe = make_pipeline(
        StandardScaler(with_mean=not issparse(x)), LogisticRegression(C=0.1, max_iter=300, tol=1e-3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline need not have converged
        probe.fit(known, labels)
    scores = {
        "difference of means": np.asarray(new @ direction).ravel(),
        "linear probe": probe.decision_function(new),
    }
    return [
        Probe(name, on, layer, float(roc_auc_score(truth, score))) for name, score in scores.items()
    ]
