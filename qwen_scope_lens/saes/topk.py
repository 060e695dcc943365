"""Exact top-k encode and gather decode, on whatever device the tensors are.

`encode_topk` is the one place that chooses how. No SAELens object comes in here: only tensors,
with the encoder row-major per feature, `rows [d_sae, d_in]`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["encode_topk", "exact_topk", "gather_decode"]

_EXACT_ELEMENTS = 2**20
"""float64 numbers per buffer of `exact_topk`: 8 MiB."""


def encode_topk(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, d_in]`, `[d_sae, d_in]`, `[d_sae]` -> float32 values and int32 indices `[n, k]`."""
    return exact_topk(x, rows, bias, k)


def exact_topk(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, slowly: every dot in float64, rounded to float32, stable sort.

    The reference of the tests, and the last resort for positions that no bound settles.
    """
    n, d_in = x.shape
    d_sae = rows.shape[0]
    step = max(64, _EXACT_ELEMENTS // d_in)
    values = x.new_zeros((n, k), dtype=torch.float32)
    indices = torch.zeros((n, k), dtype=torch.int32, device=x.device)
    for t in range(0, n, max(1, _EXACT_ELEMENTS // max(step, d_in))):
        block = x[t : t + max(1, _EXACT_ELEMENTS // max(step, d_in))].double()
        best = block.new_zeros((len(block), 0), dtype=torch.float32)
        where = torch.zeros((len(block), 0), dtype=torch.int32, device=x.device)
        for start in range(0, d_sae, step):
            tile = rows[start : start + step].double()
            scores = (block @ tile.T + bias[start : start + step].double()).float()
            ids = torch.arange(start, start + len(tile), dtype=torch.int32, device=x.device)
            # Earlier features stand first, so a stable sort leaves ties to the lower index.
            best, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
            where = torch.cat([where, ids.expand(len(block), -1)], 1).gather(1, order)
            best, where = best[:, :k], where[:, :k]
        values[t : t + len(block)] = best.relu()
        indices[t : t + len(block)] = where.masked_fill(best <= 0, 0)
    return values, indices


def gather_decode(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of `values * rows[indices]` over k. `[n, k]`, `[n, k]`, `[d_sae, d_in]` -> `[n, d_in]`

    Reads n * k rows and nothing else; differentiable in `values` and, where it asks, in `rows`.
    """
    if not len(values):
        return rows.new_zeros((0, rows.shape[1]))
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values.to(rows.dtype))
