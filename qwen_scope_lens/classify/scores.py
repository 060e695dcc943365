"""How good decisions are: F1, precision, recall, and how far resampling the documents moves them.

Resampling documents with replacement draws the counts of right and wrong decisions from a
multinomial distribution, so intervals need no loop over documents. Nothing is fitted here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.errors import BadPlan

__all__ = ["At", "Scores", "cut_for", "difference", "macro", "scored"]

REPEATS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Scores:
    """Of the positive class on some documents; `low` and `high` hold F1 in 95% of resamples."""

    n: int
    positives: int
    f1: float
    low: float
    high: float
    precision: float
    recall: float

    def __str__(self) -> str:
        return f"{self.f1:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class At:
    """An operating point: at least so much precision, or so much recall."""

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
    draws = _draws(cells, seed)
    low, high = _interval(_f1(draws))
    hits, false, missed, _ = cells
    return Scores(
        n=len(truth),
        positives=int(truth.sum()),
        f1=float(_f1(cells[None])[0]),
        low=low,
        high=high,
        precision=float(hits / max(1, hits + false)),
        recall=float(hits / max(1, hits + missed)),
    )


def macro(sets: list[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> tuple[float, float, float]:
    """Mean F1 over (predicted, truth) of several sets, each resampled alone: mean, low, high."""
    draws = [_f1(_draws(_cells(p, t), seed + i)) for i, (p, t) in enumerate(sets)]
    value = float(np.mean([_f1(_cells(p, t)[None])[0] for p, t in sets]))
    return (value, *_interval(np.mean(draws, axis=0)))


def difference(
    one: np.ndarray, other: np.ndarray, truth: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """F1 of `one` less F1 of `other` on the same documents: value, low, high."""
    kind = one.astype(int) * 4 + other.astype(int) * 2 + truth.astype(int)
    counts = np.bincount(kind, minlength=8)
    draws = _draws(counts, seed)

    def f1_of(bit: int, table: np.ndarray) -> np.ndarray:
        says = [k for k in range(8) if k & bit]
        hits = table[:, [k for k in says if k & 1]].sum(1)
        total = table[:, says].sum(1) + table[:, [k for k in range(8) if k & 1]].sum(1)
        return np.asarray(2 * hits / np.maximum(1, total))

    low, high = _interval(f1_of(4, draws) - f1_of(2, draws))
    value = f1_of(4, counts[None]) - f1_of(2, counts[None])
    return float(value[0]), low, high


def cut_for(scores: np.ndarray, truth: np.ndarray, at: At) -> float | None:
    """The cut `score > cut` that keeps `at` and has most of the other; None where none does."""
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], truth[order].cumsum()
    ends = np.append(ranked[1:] != ranked[:-1], True)  # a cut never parts equal scores
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
    """Hits, false alarms, misses, right rejections."""
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


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
