"""Ground truth of redundancy: how soon a random subset ranks the models as the whole does.

Equations 4-6: Kendall's tau between the models' accuracies on D and on a random subset S of n
items, its mean over subsets (tau_n), and R, the mean of tau_n over n = 1..N. It needs what the
proxy avoids: every model's result on every item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.errors import BadFile, TooLittleData
from qwen_scope_lens.evaluation.intervals import Interval, centred

__all__ = ["Agreement", "agreement", "ranking_curve"]

PERMUTATIONS = 100
DRAWS = 100
ALL_SIZES = 200
"""Up to here every subset size is computed; above, a grid of about this many, interpolated."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """The tau curve of one benchmark and its mean R."""

    name: str
    n_items: int
    n_models: int
    sizes: np.ndarray  # [points]
    tau: np.ndarray  # [points]
    r: Interval  # equation 6; resampled over the items, the models are taken as given
    accuracy: tuple[float, float]  # lowest and highest of the panel


def agreement(
    name: str,
    correct: np.ndarray | Sequence[Sequence[float]],
    permutations: int = PERMUTATIONS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Equations 4-6 for results `[models, items]` (0/1, or any score per item)."""
    matrix = _checked(name, correct)
    n_models, n_items = matrix.shape
    sizes = _sizes(n_items)
    rng = np.random.default_rng(seed)
    tau = ranking_curve(matrix, sizes, permutations, rng)
    value = _mean_over_sizes(sizes, tau)
    few = max(1, permutations // 10)
    drawn = np.full(draws, np.nan)
    for i in range(draws):
        again = matrix[:, rng.integers(0, n_items, n_items)]
        if np.ptp(again.mean(1)) > 0:
            drawn[i] = _mean_over_sizes(sizes, ranking_curve(again, sizes, few, rng))
    accuracy = matrix.mean(1)
    span = (float(accuracy.min()), float(accuracy.max()))
    interval = centred(value, drawn, -1.0, 1.0)
    return Agreement(name, n_items, n_models, sizes, tau, interval, span)


def ranking_curve(
    correct: np.ndarray, sizes: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """tau_n at each size, as the mean over random subsets. `[models, items] -> [sizes]`

    The first n items of a random order are a random subset of n, so one order serves all sizes.
    Tau is tau-b, as in scipy; where a subset ties all models it ranks nothing, and counts as 0.
    """
    first, second = np.triu_indices(len(correct), 1)
    whole_numbers = np.array_equal(correct, np.rint(correct))
    values: np.ndarray = correct.astype(np.int32 if whole_numbers else np.float64)
    differences: np.ndarray = np.subtract(values[first], values[second])  # [pairs, items]
    slack = 0 if whole_numbers else 1e-9 * max(1.0, float(np.abs(correct).max()))

    def signs(sums: np.ndarray) -> np.ndarray:
        return np.where(np.abs(sums) <= slack, 0, np.sign(sums)).astype(np.float32)

    whole = signs(differences.sum(1))  # [pairs]
    strict = float(np.abs(whole).sum())
    total = np.zeros(len(sizes))
    for _ in range(permutations):
        order = rng.permutation(correct.shape[1])
        part = signs(np.cumsum(differences[:, order], axis=1)[:, sizes - 1])
        decided = np.abs(part).sum(0)
        agreed = whole @ part
        norm = np.sqrt(strict * decided)
        total += np.divide(agreed, norm, out=np.zeros(len(sizes)), where=norm > 0)
    return total / permutations


def _sizes(n_items: int) -> np.ndarray:
    if n_items <= ALL_SIZES:
        return np.arange(1, n_items + 1)
    return np.unique(np.geomspace(1, n_items, ALL_SIZES).round().astype(np.int64))


def _mean_over_sizes(sizes: np.ndarray, values: np.ndarray) -> float:
    """The mean over n = 1..N of a curve known at some sizes, straight lines between them."""
    every = np.arange(1, int(sizes[-1]) + 1)
    return float(np.interp(every, sizes, values).mean())


def _checked(name: str, correct: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    matrix = np.asarray(correct, dtype=np.float64)
    if matrix.ndim != 2:
        raise BadFile(
            f"{name}: results have {matrix.ndim} dimensions; expected [models, items], one number"
            " for each model and item"
        )
    n_models, n_items = matrix.shape
    if n_models < 2 or n_items < 2:
        raise TooLittleData(
            f"{name}: {n_models} models on {n_items} items. A ranking needs at least 2 models, a"
            " subset at least 2 items"
        )
    if not np.isfinite(matrix).all():
        raise BadFile(
            f"{name}: {int((~np.isfinite(matrix)).sum())} of {matrix.size} results are missing or"
            " not finite: every model must be scored on every item"
        )
    if np.ptp(matrix.mean(1)) == 0:
        raise TooLittleData(
            f"{name}: all {n_models} models have accuracy {matrix[0].mean():.3f}, so there is no"
            " ranking to keep. Use a panel whose models differ, or leave this benchmark out"
        )
    return matrix
