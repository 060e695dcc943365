"""The largest and smallest entries of a product of two large matrices, which is never held whole.

A feature page asks this twice: which tokens a direction promotes or suppresses (directions times
the unembedding), and which other directions point the same way (directions times themselves). The
product is computed in blocks. Where it is large, candidates are found in bfloat16 and scored again
in float32, which is several times as fast and leaves the values that are shown exact to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_scope_lens.saes.exact.dots import pair_dots

__all__ = ["Extremes", "extremes"]

SIDE = 4096
"""Rows and columns of the product that are held at a time: 32 MiB in bfloat16."""

HALF_FROM = 2**36
"""From this many multiplications on, the candidates are found in bfloat16."""

CANDIDATES = 2
"""How many candidates there are per wanted entry; `SPARE` more are added."""
SPARE = 8


@dataclass(frozen=True)
class Extremes:
    """The wanted entries of each row: `values` float32, `indices` int64, both `[rows, count]`."""

    values: Tensor
    indices: Tensor


@torch.no_grad()
def extremes(
    rows: Tensor,
    columns: Tensor,
    count: int,
    *,
    smallest: bool = False,
    without_self: bool = False,
    half: bool | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    column_scale: Tensor | None = None,
    progress: str | None = None,
) -> list[Extremes]:
    """The `count` largest entries of every row of `rows @ columns.T`, in descending order.

    With `smallest`, a second result holds the smallest entries in ascending order. `without_self`
    leaves out the diagonal. `half` says whether candidates are found in bfloat16 (None: where it is
    faster). `transform` is applied to the rows block by block, and column j is multiplied by
    `column_scale[j]`, so that neither needs a second copy in float32.
    """
    count = max(0, min(count, len(columns) - int(without_self)))
    if half is None:
        half = rows.numel() * len(columns) > HALF_FROM
    ends = (True, False) if smallest else (True,)
    if not count:
        nothing = torch.empty(len(rows), 0)
        return [Extremes(nothing, nothing.long())] * len(ends)
    wanted = min(len(columns), CANDIDATES * count + SPARE) if half else count
    found: list[list[Extremes]] = [[] for _ in ends]
    with tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar:
        for start in range(0, len(rows), SIDE):
            block = rows[start : start + SIDE].float()
            block = block if transform is None else transform(block)
            own = start if without_self else None
            best = _candidates(block, columns, column_scale, ends, wanted, half, own)
            for end, (largest, values, indices) in enumerate(zip(ends, *best, strict=True)):
                if half:
                    values = _dots(block, columns, indices)
                    if column_scale is not None:
                        values *= column_scale[indices]
                    if without_self:
                        itself = indices == torch.arange(start, start + len(block))[:, None]
                        values.masked_fill_(itself, -torch.inf if largest else torch.inf)
                values, order = values.topk(count, largest=largest)
                found[end].append(Extremes(values, indices.gather(1, order)))
            bar.update(len(block))
    return [_join(parts, count) for parts in found]


def _candidates(
    block: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    ends: tuple[bool, ...],
    wanted: int,
    half: bool,
    own: int | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The `wanted` outermost entries at each end of a block of rows: their values and indices.

    `own` is the column that belongs to the first row: the diagonal from there on is left out.
    """
    dtype = torch.bfloat16 if half else torch.float32
    block = block.to(dtype)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ends]
    for first in range(0, len(columns), SIDE):
        tile = columns[first : first + SIDE]
        if scale is not None:
            tile = tile.float() * scale[first : first + SIDE, None]
        product = block @ tile.to(dtype).T
        for part, largest in zip(parts, ends, strict=True):
            if own == first:  # rows and columns are cut alike
                product.fill_diagonal_(-torch.inf if largest else torch.inf)
            values, indices = product.topk(min(wanted, len(tile)), largest=largest)
            part.append((values, indices + first))
    best: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part, largest in zip(parts, ends, strict=True):
        values, indices = (torch.cat(x, 1) for x in zip(*part, strict=True))
        values, order = values.topk(wanted, largest=largest)
        best[0].append(values)
        best[1].append(indices.gather(1, order))
    return best


def _dots(block: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    """The exact entries at `indices` `[rows, candidates]`."""
    row = torch.arange(len(block))[:, None].expand_as(indices)
    return pair_dots(columns, block, row.reshape(-1), indices.reshape(-1)).reshape(indices.shape)


def _join(parts: list[Extremes], count: int) -> Extremes:
    if not parts:
        return Extremes(torch.empty(0, count), torch.empty(0, count, dtype=torch.long))
    return Extremes(
        torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
    )
