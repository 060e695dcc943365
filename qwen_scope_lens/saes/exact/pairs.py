"""(position, feature) pairs in flat lists, and the few table operations that a selection needs.

On a CPU, NumPy compares whole numbers, and finds the k-th largest of a row, the true entries of a
mask and the order of whole numbers, two to ten times as fast as torch does; there a tensor and an
array are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = [
    "Grid",
    "Pairs",
    "Scored",
    "at_least",
    "kth_largest",
    "on_cpu",
    "pick",
    "places",
    "sorted_rows",
]


@dataclass
class Pairs:
    """(position, feature) pairs in ascending position and feature. All tensors are `[p]`."""

    token: torch.Tensor
    feature: torch.Tensor
    approx: torch.Tensor

    def take(self, which: torch.Tensor) -> Pairs:
        """Some of the pairs, by their numbers."""
        columns = (self.token, self.feature, self.approx)
        return Pairs(*(pick(column, which) for column in columns))


@dataclass(frozen=True)
class Scored:
    """Pairs in ascending position and feature, with scores from float32 dots. All are `[p]`."""

    token: torch.Tensor
    feature: torch.Tensor
    value: torch.Tensor  # the scores, in float64
    error: torch.Tensor  # upper bounds of their errors, in float64
    dot: torch.Tensor  # the dots, in float32

    def take(self, which: torch.Tensor) -> Scored:
        """Some of the pairs, by their numbers."""
        columns = (self.token, self.feature, self.value, self.error, self.dot)
        return Scored(*(pick(column, which) for column in columns))


class Grid:
    """Pairs in ascending position, as a table with a row per position."""

    def __init__(self, token: torch.Tensor, n: int) -> None:
        counts = torch.bincount(token, minlength=n)
        self.shape = (n, int(counts.max()) if n else 0)
        self.start = counts.cumsum(0) - counts
        """The number of each position's first pair. `[n]`"""
        self.rank = torch.arange(len(token), device=token.device) - pick(self.start, token)
        """How many pairs of its position stand before a pair. `[p]`"""
        self._place = token * self.shape[1] + self.rank

    def table(self, value: torch.Tensor) -> torch.Tensor:
        """The values of pairs `[p]` in their rows `[n, m]`; unused entries are -inf."""
        out = value.new_full(self.shape, float("-inf"))
        out.view(-1).scatter_(0, self._place, value)
        return out


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the memory of a CPU. A test says no, to walk the road of a GPU."""
    return tensor.device.type == "cpu"


def at_least(table: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """Which whole numbers reach the line of their row. `[n, m]`, `[n, 1] -> bool [n, m]`"""
    if not on_cpu(table):
        return table >= line
    return torch.from_numpy(table.numpy() >= line.numpy())


def kth_largest(table: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest value of each row, or -inf if it has fewer. `[n, m] -> [n]`"""
    m = table.shape[1]
    if m < k:  # which does not happen with whole numbers
        return table.new_full((len(table),), float("-inf"))
    if not on_cpu(table):
        return table.topk(k, dim=1, sorted=False).values.amin(1)
    return torch.from_numpy(np.partition(table.numpy(), m - k, axis=1)[:, m - k].copy())


def pick(values: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """`values[which]` for whole numbers `[p]`: on a CPU, indexing takes four times as long.

    `[n, ..] -> [p, ..]`
    """
    return values.index_select(0, which)


def places(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask of any shape is true, counted through from its beginning. int64 `[p]`"""
    if not on_cpu(mask):
        return mask.reshape(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def sorted_rows(keys: torch.Tensor) -> torch.Tensor:
    """Whole numbers in ascending order, row by row. `[.., m]`"""
    if not on_cpu(keys):
        return keys.sort().values
    return torch.from_numpy(np.sort(keys.numpy()))
