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
from qwen_scope_lens.saes.certified import U, approximate, select, tokens_per_block
from qwen_scope_lens.saes.encoder import Encoder
from qwen_scope_lens.saes.scores import exact_scores, exact_topk, pair_dots

__all__ = ["encode_topk", "exact_topk", "first_pass", "gather_decode"]

_COUNTS = (1, 2, 4, 12, 24, 48, 96)
"""Positions for which the two first passes are compared; the choice changes at one of them."""

_ON_GPU = 24
"""The same for a GPU, where it has never been measured."""

_NEVER = 2**62
_CLEARLY = 1.2
"""How much quicker bfloat16 has to be: it leaves a few more candidates to re-score."""

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
        precision = precision or first_pass(len(x), x.device.type, encoder.keeps_half)
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


def first_pass(tokens: int, device: str, keeps_half: bool = False) -> torch.dtype:
    """The precision in which the first pass over `tokens` positions is cheapest here."""
    return torch.bfloat16 if tokens >= _half_from(device, keeps_half) else torch.float32


@cache
def _half_from(device: str, keeps_half: bool) -> int:
    """The fewest positions from which a bfloat16 first pass, the conversion of the weights
    included unless a copy is kept, clearly beats float32. Measured once per process: 0.2 s.
    """
    if device != "cpu":
        return _ON_GPU
    with torch.no_grad():
        encoder = Encoder(torch.ones(8192, 1024), torch.zeros(8192), keeps_half)
        found = _NEVER
        for count in reversed(_COUNTS):
            x = torch.ones(count, 1024)
            took = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
            for _ in range(5):
                for dtype in took:
                    start = time.thread_time()
                    approximate(encoder, x, x[:, :0], dtype)
                    took[dtype] = min(took[dtype], time.thread_time() - start)
            if took[torch.bfloat16] * _CLEARLY > took[torch.float32]:
                break
            found = count
    return found


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
    if not values.numel():
        return rows.new_zeros((len(values), rows.shape[1])) + values.sum().to(rows.dtype)
    if rows.dtype == torch.float64 or (torch.is_grad_enabled() and rows.requires_grad):
        return _sum_of_rows(values, indices, rows)
    if kernels.available(rows.device):
        return kernels.decode(values, indices, rows)
    return _GatherDecode.apply(values, indices, rows)


def _sum_of_rows(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values.to(rows.dtype))


class _GatherDecode(torch.autograd.Function):
    """Of frozen rows. torch's own gradient of the values takes twice as long as `pair_dots`."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(indices, rows)
        ctx.dtype = values.dtype
        return _sum_of_rows(values, indices, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        indices, rows = ctx.saved_tensors
        n, k = indices.shape
        token = torch.arange(n, device=rows.device).repeat_interleave(k)
        grad = grads[0].float().contiguous()
        dots = pair_dots(rows, grad, token, indices.reshape(-1).long())
        return dots.reshape(n, k).to(ctx.dtype), None, None
