"""The counterparts of one feature in another SAE, without matching all features.

Scores and the null are those of `match.py`: a score counts if few other features of A have one as
high in a shuffled copy of B.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope_lens.compare.match import CORRELATION, COSINE
from qwen_scope_lens.compare.null import shuffled_directions, shuffled_rows
from qwen_scope_lens.errors import LayerOutOfRange, TooLittleData
from qwen_scope_lens.features.nearest import Nearest, nearest_by_correlation, nearest_by_cosine
from qwen_scope_lens.features.pool import canonical
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Counterpart", "Counterparts", "counterparts_by_activation", "counterparts_by_decoder"]

NULL_ROWS = 512
"""Other features of A whose best scores in a shuffled B are the null."""


@dataclass(frozen=True)
class Counterpart:
    """A feature of B that is near to the one feature of A."""

    ref: str
    score: float
    p_value: float  # share of null scores that are as high, the score itself counted as one
    back: int | None  # the place of the one feature among all of A, seen from here; 1 is mutual,
    # and None is beyond the candidates


@dataclass(frozen=True, repr=False)
class Counterparts(View):
    """The nearest features of B, best first."""

    feature: str
    b: str
    measure: str
    rows: tuple[Counterpart, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self, most: int | None = None) -> Table:
        rows = self.rows[:most]
        return Table.of(
            ("counterpart", "score", "p", "place back"),
            [(one.ref, one.score, one.p_value, one.back) for one in rows],
            above=(f"{self.feature} -> {self.b}, by {self.measure}", ""),
            below=(
                "",
                "p: how often other features reach such a score in a shuffled B",
                "place back: of the feature among all of A, seen from there; 1 is mutual",
            ),
            more=len(self.rows) - len(rows),
            formats={"score": ".3f", "p": ".2g"},
        )


def counterparts_by_decoder(
    a: torch.Tensor,
    feature: int,
    b: torch.Tensor,
    names: tuple[str, str] = ("A", "B"),
    *,
    candidates: int = 8,
    seed: int = 0,
) -> Counterparts:
    """By the cosine of decoder directions `[n_a, d_model]` and `[n_b, d_model]`."""
    rows = _others(len(a), feature, names[0], seed)
    found = nearest_by_cosine(a[feature : feature + 1], b, candidates)
    null = nearest_by_cosine(a[torch.from_numpy(rows)], shuffled_directions(b, seed + 1), 1)
    near = [int(one) for one in found.of_a[0] if one >= 0]
    back = nearest_by_cosine(b[torch.tensor(near)], a, candidates)
    return _counterparts(feature, found, null.score_a[:, 0], back, names, COSINE, seed)


def counterparts_by_activation(
    a: csr_matrix,
    feature: int,
    b: csr_matrix,
    names: tuple[str, str] = ("A", "B"),
    *,
    doc: Any = None,
    candidates: int = 8,
    least: int = 5,
    seed: int = 0,
) -> Counterparts:
    """By the correlation of activations on the same pieces of text, the rows of `a` and `b`."""
    a, b = canonical(a).tocsc(), canonical(b)
    rows = _others(a.shape[1], feature, names[0], seed)
    rows = rows[np.diff(a.indptr)[rows] >= least]
    found = nearest_by_correlation(a[:, [feature]].tocsr(), b, candidates, least=least)
    near = [int(one) for one in found.of_a[0] if one >= 0]
    if not near or not len(rows):
        raise TooLittleData(
            f"{names[0]}/{feature} fires together with no feature of {names[1]} on {least} common"
            " pieces of text: there is nothing to correlate"
        )
    shuffled = shuffled_rows(b, seed + 1, doc)
    null = nearest_by_correlation(a[:, rows].tocsr(), shuffled, 1, least=least).score_a[:, 0]
    null = np.where(np.isfinite(null), null, 0.0)
    back = nearest_by_correlation(b.tocsc()[:, near].tocsr(), a.tocsr(), candidates, least=least)
    return _counterparts(feature, found, null, back, names, CORRELATION, seed)


def _others(n: int, feature: int, name: str, seed: int) -> np.ndarray[Any, Any]:
    if not 0 <= feature < n:
        raise LayerOutOfRange(f"{name} has the features 0 to {n - 1}, not {feature}")
    rows = np.random.default_rng(seed).permutation(n)
    return np.sort(rows[rows != feature][:NULL_ROWS])


def _counterparts(
    feature: int,
    found: Nearest,
    null: np.ndarray[Any, Any],
    back: Nearest,
    names: tuple[str, str],
    measure: str,
    seed: int,
) -> Counterparts:
    rows = []
    near = [(int(f), float(s)) for f, s in zip(found.of_a[0], found.score_a[0], strict=True)]
    for number, (other, score) in enumerate((f, s) for f, s in near if f >= 0):
        place = np.flatnonzero(back.of_a[number] == feature)
        above = int((null >= score).sum())
        rows.append(
            Counterpart(
                f"{names[1]}/{other}",
                score,
                (1 + above) / (1 + len(null)),
                int(place[0]) + 1 if len(place) else None,
            )
        )
    settings = {"null_scores": len(null), "seed": seed, "candidates": found.of_a.shape[1]}
    return Counterparts(f"{names[0]}/{feature}", names[1], measure, tuple(rows), settings)
