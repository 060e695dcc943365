"""How good decisions are: F1, precision and recall, with intervals over resampled documents.

If documents are resampled with replacement, the counts of right and wrong decisions follow a
multinomial distribution, so intervals need no loop over documents. This module fits nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.stats import Interval, between

__all__ = ["At", "Scores", "cut_for", "difference", "macro", "scored"]

REPEATS = 2000


@dataclass(frozen=True)
class Scores:
    """Scores of the positive class; F1 lies between `low` and `high` in 95% of resamples."""

    n: int
    positives: int
    f1: float
    low: float
    high: float
    precision: float
    recall: float

    def __str__(self) -> str:
        return str(Interval(self.f1, self.low, self.high))


@dataclass(frozen=True)
class At:
    """An operating point: a minimum precision, or a minimum recall."""

    what: str
    value: float

    @classmethod
    def parse(cls, text: str) -> At:
        """From `precision=0.9` or `recall=0.95`."""
        what, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if what not in ("precision", "recall") or not 0 < value <= 1:
            raise BadPlan(
                f"operating point {text!r}: expected such as precision=0.9 or recall=0.95"
            )
        return cls(what, value)

    def __str__(self) -> str:
        return f"{self.what} >= {self.value:g}"


def scored(predicted: np.ndarray, truth: np.ndarray, seed: int = 0) -> Scores:
    """Decisions against the truth, both bool `[n]`."""
    cells = _cells(predicted, truth)
    f1 = between(float(_f1(cells[None])[0]), _f1(_draws(cells, seed)))
    hits, false, missed, _ = cells
    return Scores(
        n=len(truth),
        positives=int(truth.sum()),
        f1=f1.value,
        low=f1.low,
        high=f1.high,
        precision=float(hits / max(1, hits + false)),
        recall=float(hits / max(1, hits + missed)),
    )


def macro(sets: list[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Interval:
    """Mean F1 over several sets of (predicted, truth), each of which is resampled by itself."""
    draws = [_f1(_draws(_cells(p, t), seed + i)) for i, (p, t) in enumerate(sets)]
    value = float(np.mean([_f1(_cells(p, t)[None])[0] for p, t in sets]))
    return between(value, np.mean(draws, axis=0))


def difference(one: np.ndarray, other: np.ndarray, truth: np.ndarray, seed: int = 0) -> Interval:
    """F1 of `one` minus F1 of `other` on the same documents."""
    kind = one.astype(int) * 4 + other.astype(int) * 2 + truth.astype(int)
    counts = np.bincount(kind, minlength=8)
    draws = _draws(counts, seed)

    def f1_of(bit: int, table: np.ndarray) -> np.ndarray:
        says = [k for k in range(8) if k & bit]
        hits = table[:, [k for k in says if k & 1]].sum(1)
        total = table[:, says].sum(1) + table[:, [k for k in range(8) if k & 1]].sum(1)
        return np.asarray(2 * hits / np.maximum(1, total))

    value = f1_of(4, counts[None]) - f1_of(2, counts[None])
    return between(float(value[0]), f1_of(4, draws) - f1_of(2, draws))


def cut_for(scores: np.ndarray, truth: np.ndarray, at: At) -> float | None:
    """The cut `score > cut` that meets `at` with the most of the other figure.

    None if no cut meets `at`.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], truth[order].cumsum()
    ends = np.append(ranked[1:] != ranked[:-1], True)  # a cut never separates equal scores
    precision = right / np.arange(1, len(truth) + 1)
    recall = right / max(1, int(truth.sum()))
    wanted, other = (precision, recall) if at.what == "precision" else (recall, precision)
    allowed = np.nonzero(ends & (wanted >= at.value))[0]
    if not len(allowed):
        return None
    best = allowed[np.argmax(other[allowed])]
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best] - 1.0
    return float((ranked[best] + below) / 2) if np.isfinite(below) else float(ranked[best] - 1.0)


def _cells(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts of hits, false alarms, misses and correct rejections."""
    return np.array(
        [
            (predicted & truth).sum(),
            (predicted & ~truth).sum(),
            (~predicted & truth).sum(),
            (~predicted & ~truth).sum(),
        ]
    )


def _draws(counts: np.ndarray, seed: int) -> np.ndarray:
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    return rng.multinomial(total, counts / max(1, total), size=REPEATS)


def _f1(cells: np.ndarray) -> np.ndarray:
    hits, false, missed = cells[:, 0], cells[:, 1], cells[:, 2]
    return np.asarray(2 * hits / np.maximum(1, 2 * hits + false + missed))
