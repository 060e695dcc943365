"""Correlations between footprints and the scores of models: equation 12 and its relatives.

Performance similarity is Pearson's correlation of two benchmarks' scores over the models. Its
partial form controls for a broad benchmark (MMLU in the paper). Pairs of benchmarks share
benchmarks, so intervals resample benchmarks and never pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as bind

import numpy as np

from qwen_scope_lens.errors import StoreMismatch, TooLittleData, UnknownName
from qwen_scope_lens.stats import Interval, between, pearson, spearman

__all__ = [
    "PairCorrelation",
    "correlate",
    "correlate_pairs",
    "over_benchmarks",
    "partial",
    "partial_rank",
    "similarity",
    "spearman",
    "split_control",
]

NEARLY_ONE = 1 - 1e-12
DRAWS = 1000
"""Resamples of benchmarks behind an interval."""


@dataclass(frozen=True)
class PairCorrelation:
    """How two measures of similarity agree over all pairs of benchmarks."""

    n_benchmarks: int
    n_pairs: int
    pearson: Interval
    spearman: Interval
    p_value: float  # Mantel test: how often shuffled benchmarks reach this Spearman


def over_benchmarks(
    statistic: Callable[[np.ndarray], float], n: int, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of `statistic(benchmark numbers)` when n benchmarks are drawn with replacement.

    Draws of fewer than three different benchmarks are left out, and so are draws on which the
    statistic is undefined.
    """
    if n < 3:
        raise TooLittleData(f"a correlation over {n} benchmarks: at least 3 are needed")
    rng = np.random.default_rng(seed)
    found = np.full(draws, np.nan)
    for i in range(draws):
        numbers = rng.integers(0, n, n)
        if len(np.unique(numbers)) >= 3:
            found[i] = statistic(numbers)
    return between(statistic(np.arange(n)), found)


def partial(r_ij: float, r_im: float, r_jm: float) -> float:
    """Equation 12: the correlation of i and j when m is held fixed."""
    if max(abs(r_im), abs(r_jm)) > NEARLY_ONE:
        raise TooLittleData(
            "the scores of a benchmark are a linear function of the control's (|correlation| = 1),"
            " so nothing is left once the control is held fixed (equation 12 divides by zero)."
            " Leave that benchmark out, or use more models"
        )
    value = (r_ij - r_im * r_jm) / np.sqrt((1 - r_im**2) * (1 - r_jm**2))
    return float(np.clip(value, -1, 1))


def similarity(
    scores: np.ndarray, names: Sequence[str], control: np.ndarray | None = None
) -> np.ndarray:
    """Performance similarity of every pair, `[models, benchmarks] -> [benchmarks, benchmarks]`.

    With `control`, the scores `[models]` of a benchmark that is in none of the pairs, this is
    equation 12.
    """
    scores = np.asarray(scores, dtype=float)
    n_models = len(scores)
    if n_models < 3:
        raise TooLittleData(f"scores of {n_models} models: a correlation over models needs 3")
    columns = [*scores.T] + ([] if control is None else [np.asarray(control, dtype=float)])
    for name, column in zip([*names, "the control benchmark"], columns, strict=False):
        if np.ptp(column) == 0:
            raise TooLittleData(
                f"{name}: all {n_models} models score {column[0]:.3f}, so correlations with it are"
                " undefined. Leave it out, or use a panel whose models differ on it"
            )
    if control is not None:
        for name, column in zip(names, scores.T, strict=True):
            if np.array_equal(column, columns[-1]):
                raise StoreMismatch(
                    f"{name} has exactly the scores of the control benchmark. The control must not"
                    " be one of the pairs, because equation 12 would divide by zero"
                )
    found = np.eye(len(names))
    to_control = [pearson(c, columns[-1]) for c in scores.T] if control is not None else []
    for i in range(len(names)):
        for j in range(i):
            r = pearson(scores[:, i], scores[:, j])
            found[i, j] = found[j, i] = (
                partial(r, to_control[i], to_control[j]) if to_control else r
            )
    return found


def split_control(
    scores: np.ndarray, names: Sequence[str], control: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Scores and names of the other benchmarks, and the scores of the control."""
    if control not in names:
        raise UnknownName(
            f"the scores do not have the control benchmark {control!r}: found {', '.join(names)}"
        )
    at = list(names).index(control)
    rest = [i for i in range(len(names)) if i != at]
    return np.asarray(scores)[:, rest], [names[i] for i in rest], np.asarray(scores)[:, at]


def correlate(
    x: np.ndarray, y: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[Interval, Interval]:
    """Pearson and Spearman between two figures per benchmark, with bootstrap intervals."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return (
        over_benchmarks(lambda rows: pearson(x[rows], y[rows]), len(x), draws, seed),
        over_benchmarks(lambda rows: spearman(x[rows], y[rows]), len(x), draws, seed),
    )


def partial_rank(
    x: np.ndarray, y: np.ndarray, m: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Spearman of x and y over the benchmarks when m is held fixed (equation 12 on ranks).

    It is NaN where the order of x or y is that of m.
    """
    x, y, m = (np.asarray(values, dtype=float) for values in (x, y, m))

    def over(rows: np.ndarray) -> float:
        to_m = spearman(x[rows], m[rows]), spearman(y[rows], m[rows])
        if not max(map(abs, to_m)) <= NEARLY_ONE:
            return float("nan")
        return partial(spearman(x[rows], y[rows]), *to_m)

    return over_benchmarks(over, len(x), draws, seed)


def correlate_pairs(
    a: np.ndarray,
    b: np.ndarray,
    keep: np.ndarray | None = None,
    shuffles: int = 999,
    seed: int = 0,
    draws: int = DRAWS,
) -> PairCorrelation:
    """Two symmetric tables `[benchmarks, benchmarks]`, compared over their pairs.

    `keep` (bool, symmetric) says which pairs count, for example where some benchmarks share items.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(a)
    counts = ~np.eye(n, dtype=bool) if keep is None else np.asarray(keep) & ~np.eye(n, dtype=bool)
    rows, columns = np.triu_indices(n, 1)
    n_pairs = int(counts[rows, columns].sum())
    if n_pairs < 3:
        raise TooLittleData(f"{n_pairs} pairs of benchmarks: a correlation over pairs needs 3")

    def over(measure: Callable[[np.ndarray, np.ndarray], float], numbers: np.ndarray) -> float:
        i, j = numbers[rows], numbers[columns]
        wanted = counts[i, j]
        return measure(a[i[wanted], j[wanted]], b[i[wanted], j[wanted]])

    straight, ranks = (
        over_benchmarks(bind(over, measure), n, draws, seed) for measure in (pearson, spearman)
    )
    rng = np.random.default_rng(seed)
    reached = 0
    for _ in range(shuffles):
        order = rng.permutation(n)
        i, j = order[rows], order[columns]
        wanted = counts[i, j] & counts[rows, columns]  # the pair counts in both tables
        there = a[i[wanted], j[wanted]], b[rows[wanted], columns[wanted]]
        reached += len(there[0]) > 1 and spearman(*there) >= ranks.value - 1e-12
    return PairCorrelation(n, n_pairs, straight, ranks, (reached + 1) / (shuffles + 1))
