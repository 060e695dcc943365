"""Does the test behind `qsl rank` hold where nothing is to be found?

    python benchmarks/null_ranking.py > benchmarks/results/null_ranking.txt

Planted corpora whose labels mean nothing: documents are positive by lot. Counted are the labellings
in which any feature passes at 5%, with the test of `features/contrast.py` and with the normal
approximation alone, which it once was; and how often the p-values fall below a limit, as a multiple
of what is allowed. Rates of firing are spread evenly on a logarithmic scale.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
from _measure import cpu_name
from scipy.sparse import csr_matrix
from scipy.stats import false_discovery_control

import qwen_scope_lens.features.contrast as contrast
from qwen_scope_lens.features import RankSums

LEAST = 3
"""Documents that a feature must fire on to be tested, as in `rank`."""
BATCH = 20
LIMITS = (1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Shape:
    n_positive: int
    n_negative: int
    features: int
    rates: tuple[float, float]
    values: str  # "gamma", or "few levels": 1, and sometimes 2 or 3
    labellings: int


SHAPES = (
    Shape(48, 2000, 65_536, (0.001, 0.05), "gamma", 100),
    Shape(48, 2000, 4_096, (0.001, 1.0), "gamma", 200),
    Shape(48, 2000, 4_096, (0.001, 1.0), "few levels", 200),
    Shape(10, 5000, 4_096, (0.001, 0.3), "gamma", 200),
    Shape(1000, 1000, 4_096, (0.001, 1.0), "gamma", 200),
    Shape(34, 277, 4_096, (0.01, 1.0), "gamma", 200),
)


def corpus(shape: Shape, seed: int) -> csr_matrix:
    """Documents x features; every feature fires on documents drawn by lot."""
    rng = np.random.default_rng(seed)
    n = shape.n_positive + shape.n_negative
    rates = np.exp(rng.uniform(*np.log(shape.rates), shape.features))
    rows = [rng.choice(n, rng.binomial(n, rate), replace=False) for rate in rates]
    column = np.repeat(np.arange(shape.features), [len(row) for row in rows])
    if shape.values == "gamma":
        values = rng.gamma(2.0, size=len(column)) + 0.01
    else:
        values = rng.choice([1.0, 2.0, 3.0], len(column), p=[0.97, 0.02, 0.01])
    place = (np.concatenate(rows), column)
    return csr_matrix((values.astype(np.float32), place), shape=(n, shape.features))


def normal_only(sums: RankSums, labels: np.ndarray) -> np.ndarray:
    """p-values of the approximation alone: nothing is unlikely enough to be computed again."""
    likely, contrast.LIKELY = contrast.LIKELY, 0.0
    try:
        return sums.test(labels)[1]
    finally:
        contrast.LIKELY = likely


def measure(shape: Shape) -> None:
    sums = RankSums(corpus(shape, seed=0))
    tested = sums.documents >= LEAST
    rng = np.random.default_rng(1)
    n = shape.n_positive + shape.n_negative
    kinds = {
        "exact tail": lambda labels: sums.test(labels)[1],
        "normal only": lambda labels: normal_only(sums, labels),
    }
    passed: dict[str, dict[str, list[int]]] = {k: {"bh": [], "by": []} for k in kinds}
    below = {kind: np.zeros(len(LIMITS)) for kind in kinds}
    seconds = dict.fromkeys(kinds, 0.0)
    for _ in range(shape.labellings // BATCH):
        draws = [rng.permutation(n) < shape.n_positive for _ in range(BATCH)]
        labels = np.stack(draws, axis=1)
        for kind, test in kinds.items():
            began = time.perf_counter()
            p = test(labels)[tested]
            seconds[kind] += time.perf_counter() - began
            below[kind] += [(p <= limit).sum() for limit in LIMITS]
            for method, counts in passed[kind].items():
                q = false_discovery_control(p, axis=0, method=method)
                counts += (q <= 0.05).sum(0).tolist()
    low, high = shape.rates
    print(
        f"\n{shape.n_positive} against {shape.n_negative:,}, {int(tested.sum()):,} tested"
        f" features of {shape.features:,}, rates {low:g} to {high:g}, {shape.values};"
        f" {shape.labellings} labellings"
    )
    for kind in kinds:
        cells = "  ".join(
            f"{method.upper()}: any in {np.mean(np.array(counts) > 0):6.1%}, at most {max(counts)}"
            for method, counts in passed[kind].items()
        )
        allowed = int(tested.sum()) * shape.labellings * np.array(LIMITS)
        times = "  ".join(f"{x:.2f}" for x in below[kind] / allowed)
        print(
            f"  {kind:12} {cells}\n{'':15}p below {', '.join(f'{x:g}' for x in LIMITS)}:"
            f" {times} times what is allowed; {seconds[kind] / shape.labellings:.3f} s"
            " per labelling"
        )
        sys.stdout.flush()


def main() -> None:
    print(f"Rankings where nothing is to be found. {cpu_name()}")
    for shape in SHAPES:
        measure(shape)


if __name__ == "__main__":
    main()
