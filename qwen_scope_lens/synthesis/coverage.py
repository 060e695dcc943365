"""Coverage: which features a set of texts activates, as arithmetic on arrays.

Equations 18, 20 and 23 of the Qwen-Scope report and the FAC of FAC Synthesis; they differ in the
threshold and in what the denominator is. Where the activations come from is `reader.py` for texts
and a feature store for corpora.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.pool import canonical

__all__ = ["coverage", "curve", "documents_firing", "fac"]

Array = np.ndarray[Any, Any]


def documents_firing(maxima: csr_matrix, threshold: float = 0.0) -> Array:
    """On how many documents each feature's maximum exceeds the threshold. `[docs, d] -> [d]`

    The coverage bit of a feature (equation 18) is whether this is above zero.
    """
    maxima = canonical(maxima)
    above = maxima.data > threshold
    return np.bincount(maxima.indices[above], minlength=maxima.shape[1]).astype(np.int64)


def coverage(targets: Iterable[Any], fired: Iterable[Iterable[Any]]) -> float:
    """The share of the targets that at least one example activates (equation 23)."""
    wanted = set(targets)
    if not wanted:
        raise TooLittleData("no target features: there is nothing to cover")
    return len(wanted & set().union(*fired)) / len(wanted)


def fac(generated: Array, anchor: Array) -> float:
    """Feature activation coverage, `|F(Q_Z)| / |F(P_Z)|`: bool `[d]` each.

    Of the features of the anchor data, the share that the generated data has. Features that only
    the generated data has do not count, so that it cannot exceed 1.
    """
    wanted = int(anchor.sum())
    if not wanted:
        raise TooLittleData("the anchor data activates no feature: there is nothing to cover")
    return int((generated & anchor).sum()) / wanted


def curve(targets: Iterable[Any], fired: Sequence[Iterable[Any]]) -> Array:
    """Coverage after the first 0, 1, .., n examples. `-> float64 [n + 1]`"""
    wanted = set(targets)
    if not wanted:
        raise TooLittleData("no target features: there is nothing to cover")
    seen: set[Any] = set()
    found = [0]
    for features in fired:
        seen |= wanted.intersection(features)
        found.append(len(seen))
    return np.array(found) / len(wanted)
