"""Exact top-k encode and gather decode, on whatever device the tensors are.

`encode_topk` is the one place that chooses how: which precision makes the first pass, and what
happens to the positions it does not settle. No SAELens object comes in here.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes import kernels
from qwen_scope_lens.saes.certified import U, select, tokens_per_block
from qwen_scope_lens.saes.encoder import Encoder
from qwen_scope_lens.saes.scores import exact_scores, exact_topk, pair_dots

__all__ = ["encode_topk", "exact_topk", "first_pass", "gather_decode"]

_HALF_FROM = 24
"""Positions from which a bfloat16 first pass can win: below, reading the weights is the cost."""

_CROWDED = 5.0
"""Candidates over k from which another centre is worth trying; 2 to 4 is what a good one gives."""


def encode_topk(
    x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, d_in] -> float32 values, int32 indices [n, k]`, descending, ties by lower index.

    The values are differentiable in `x`. `precision` overrides the choice of the first pass; the
    result does not depend on it.
    """
    if k > encoder.d_sae:
        raise ValueError(f"k={k} of {encoder.d_sae} features; expected k <= d_sae")
    return _TopK.apply(x, encoder, k, precision)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = x.float()
        precision = precision or first_pass(len(x), x.device.type)
        parts = [
            _encode_block(block, encoder, k, precision)
            for block in exact.split(tokens_per_block(encoder.d_sae, precision))
        ]
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(values, indices)
        ctx.rows, ctx.dtype = encoder.rows, x.dtype
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        values, indices = ctx.saved_tensors
        into = gather_decode(grads[0] * (values > 0), indices, ctx.rows)
        return into.to(ctx.dtype), None, None, None


def first_pass(tokens: int, device: str) -> torch.dtype:
    """The precision in which the first pass over `tokens` positions is cheapest here."""
    half = tokens >= _HALF_FROM and _half_pays(device)
    return torch.bfloat16 if half else torch.float32


@cache
def _half_pays(device: str) -> bool:
    """Whether bfloat16 products beat float32 clearly. Measured once per process: some 50 ms."""
    if device != "cpu":
        return True
    with torch.no_grad():
        a, b = torch.ones(128, 1024), torch.ones(2048, 1024)
        pairs = {torch.float32: (a, b.T), torch.bfloat16: (a.bfloat16(), b.bfloat16().T)}
        took = {dtype: float("inf") for dtype in pairs}
        for _ in range(8):
            for dtype, (left, right) in pairs.items():
                start = time.perf_counter()
                left @ right
                took[dtype] = min(took[dtype], time.perf_counter() - start)
    return took[torch.bfloat16] * 1.3 < took[torch.float32]


def _encode_block(
    x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_topk` of few enough positions, float32 `[n, d_in]`."""
    chosen, settled, dots = select(encoder, x, k, precision)
    poorly = precision == torch.bfloat16 and encoder.crowding > _CROWDED
    if poorly and encoder.recentre(x):
        chosen, settled, dots = select(encoder, x, k, precision)
    values, indices = _valued(x, encoder, chosen, dots)
    encoder.settled[str(precision).removeprefix("torch.")] += int(settled.sum())
    rest = (~settled).nonzero().squeeze(1)
    if not len(rest):
        return values, indices
    if precision == torch.bfloat16:
        # A block of float32 is twice as large: hence half the positions at a time.
        parts = [
            _encode_block(part, encoder, k, torch.float32)
            for part in x[rest].split(tokens_per_block(encoder.d_sae, torch.float32))
        ]
        values[rest], indices[rest] = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        # Pads and other repeated rows are settled once.
        rows, back = x[rest].unique(dim=0, return_inverse=True)
        found = exact_topk(rows, encoder.rows, encoder.bias, k)[1]
        exact_values, exact_indices = _valued(rows, encoder, found, None)
        values[rest], indices[rest] = exact_values[back], exact_indices[back]
        encoder.settled["float64"] += len(rest)
    return values, indices


def _valued(
    x: torch.Tensor, encoder: Encoder, chosen: torch.Tensor, dots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected features -> values within float32 rounding and indices, in SparseCodes's order.

    The same numbers whichever pass selected the features: one float32 dot each, summed in a fixed
    order, and the exact score where that order may have lost the sign or overflowed.
    """
    token, column = (chosen >= 0).nonzero(as_tuple=True)
    feature = chosen[token, column]
    bias = encoder.bias.float()[feature]
    if dots is None:
        value = pair_dots(encoder.rows, x, token, feature) + bias
    else:
        value = dots[token, column] + bias
    doubt = x.norm(dim=1)[token] * encoder.norms[feature] * (1.1 * encoder.d_in * U)
    unsure = ~(value > doubt + 2 * U * bias.abs())
    unsure |= ~value.isfinite()
    if bool(unsure.any()):
        t, f = token[unsure], feature[unsure]
        value[unsure] = exact_scores(encoder.rows, encoder.bias, x, t, f).float()
        if not bool(value.isfinite().all()):
            raise NotFinite(
                "pre-activations exceed float32 for finite inputs: expected residuals and weights "
                f"whose products stay below 3.4e38; found norms up to {float(x.norm(dim=1).max())}"
            )
    values = x.new_zeros(chosen.shape)
    values[token, column] = value
    indices = chosen.clamp_min(0).to(torch.int32)
    # Ascending feature first, padding last; then by value, keeping that order among equals.
    order = torch.where(chosen >= 0, chosen, encoder.d_sae).argsort(dim=1)
    values, indices = values.gather(1, order), indices.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def gather_decode(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of `values * rows[indices]` over k. `[n, k]`, `[n, k]`, `[d_sae, d_in]` -> `[n, d_in]`

    Reads n * k rows and nothing else; differentiable in `values` and, where it asks, in `rows`.
    """
    if not len(values):
        return rows.new_zeros((0, rows.shape[1])) + values.sum().to(rows.dtype)
    if kernels.available(rows.device) and not (torch.is_grad_enabled() and rows.requires_grad):
        return kernels.decode(values, indices, rows)
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values.to(rows.dtype))
