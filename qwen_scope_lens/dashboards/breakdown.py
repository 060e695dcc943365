"""On which kinds of documents features fire: the share of tokens, by language or other label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen_scope_lens.features.store import FeatureStore

__all__ = ["MOST_VALUES", "Breakdown", "break_down"]

MOST_VALUES = 30
"""A label with more values, or with as many as documents (a key, a number), tells documents apart
and not kinds of them."""


@dataclass(frozen=True)
class Breakdown:
    """One label: its values, the tokens of each, and the tokens on which each feature fires."""

    name: str
    values: tuple[str, ...]
    tokens: np.ndarray  # int64 [values]
    fired: np.ndarray  # int64 [d_sae, values]

    def of(self, feature: int) -> list[tuple[str, int, int]]:
        """Value, tokens on which the feature fires, all tokens; by falling share."""
        share = self.fired[feature] / np.maximum(1, self.tokens)
        order = np.lexsort((np.arange(len(share)), -share))
        return [
            (self.values[i], int(self.fired[feature, i]), int(self.tokens[i]))
            for i in order.tolist()
        ]


def break_down(store: FeatureStore, layer: int) -> list[Breakdown]:
    """Every label of the store that has few values, from one pass over the layer."""
    d_sae = store.sae(layer).d_sae
    codes_of: dict[str, np.ndarray] = {}
    found: dict[str, Breakdown] = {}
    for name in store.label_names:
        column = [None if value is None else str(value) for value in store.labels(name)]
        values = sorted({value for value in column if value is not None})
        known = sum(value is not None for value in column)
        if not 2 <= len(values) <= min(MOST_VALUES, known // 2):
            continue
        number = {value: i for i, value in enumerate(values)} | {None: -1}
        codes_of[name] = np.array([number[value] for value in column])
        zeros = np.zeros(len(values), np.int64)
        found[name] = Breakdown(
            name, tuple(values), zeros, np.zeros((d_sae, len(values)), np.int64)
        )
    if not found:
        return []
    for block in store.iter_blocks(layer, keep=True):
        active = block.codes.active.numpy()
        row, _ = active.nonzero()
        feature = block.codes.indices.numpy()[active].astype(np.int64)
        for name, entry in found.items():
            kind, width = codes_of[name][block.doc], len(entry.values)
            entry.tokens[:] += np.bincount(kind[kind >= 0], minlength=width)
            known = kind[row] >= 0
            at = feature[known] * width + kind[row][known]
            entry.fired[:] += np.bincount(at, minlength=d_sae * width).reshape(d_sae, width)
    return list(found.values())
