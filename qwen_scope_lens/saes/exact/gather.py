"""Sums over a few rows of a matrix, with all their derivatives. Decoding codes is such a sum.

With `values [n, k]`, `indices [n, k]`, `rows [m, d]` and `grad [n, d]` there are three products:

    gather   out[n] = sum over j of values[n, j] * rows[indices[n, j]]
    dots     out[n, j] = grad[n] . rows[indices[n, j]]
    scatter  out[i] = sum of values[n, j] * grad[n] where indices[n, j] = i

The derivatives of each product are the other two. So one rule gives derivatives of every order,
forward mode and functorch's transforms, and none of them makes a tensor `[n, k, d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from qwen_scope_lens.saes.exact import kernels
from qwen_scope_lens.saes.exact.dots import pair_dots
from qwen_scope_lens.saes.exact.transforms import transformed, untracked

__all__ = ["dots", "gather_decode"]

_ELEMENTS = 2**22
"""How many numbers a working buffer holds where torch has no product for the job."""


def gather_decode(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of `values * rows[indices]` over k.

    `values [n, k]`, `indices [n, k]`, `rows [d_sae, d_in] -> [n, d_in]`. Only n * k rows are read.
    The sum is differentiable in `values`, and in `rows` if they require a gradient.
    """
    if not values.numel() and not transformed():
        return rows.new_zeros((len(values), rows.shape[1])) + values.sum().to(rows.dtype)
    if untracked(values, rows):
        return _gather(values, indices, rows)
    out: torch.Tensor = _Gather.apply(values, indices, rows)
    return out


def dots(grad: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The dots of each position with its own k rows.

    `grad [n, d]`, `indices [n, k]`, `rows [m, d] -> [n, k]`
    """
    out: torch.Tensor = _Dots.apply(grad, indices, rows)
    return out


def _gather(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if kernels.available(rows.device) and rows.dtype != torch.float64:
        return kernels.decode(values, indices, rows)
    with torch.autocast(rows.device.type, enabled=False):
        return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values.to(rows.dtype))


def _dots(grad: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    n, k = indices.shape
    if rows.dtype == torch.float64 or grad.dtype == torch.float64:
        step = max(1, _ELEMENTS // max(1, k * rows.shape[1]))
        parts = [
            (g.double()[:, None] * rows[i.long()].double()).sum(-1)
            for g, i in zip(grad.split(step), indices.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else grad.new_zeros((n, k))
    token = torch.arange(n, device=rows.device).repeat_interleave(k)
    with torch.autocast(rows.device.type, enabled=False):
        flat = pair_dots(rows, grad.float().contiguous(), token, indices.reshape(-1).long())
    return flat.reshape(n, k)


def _scatter(
    values: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor, m: int
) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(values.dtype, grad.dtype), torch.float32)
    out = torch.zeros((m, grad.shape[1]), dtype=dtype, device=grad.device)
    step = max(1, _ELEMENTS // max(1, indices.shape[1] * grad.shape[1]))
    for v, g, i in zip(values.split(step), grad.split(step), indices.split(step), strict=True):
        terms = v.to(dtype)[..., None] * g.to(dtype)[:, None]
        out.index_add_(0, i.reshape(-1).long(), terms.flatten(0, 1))
    return out


class _Product(torch.autograd.Function):
    """The common part of the three products: their inputs are kept for the derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.rest = inputs[3:]


class _Gather(_Product):
    """`values [n, k]`, `indices [n, k]`, `rows [m, d] -> [n, d]` in the dtype of the rows."""

    @staticmethod
    def forward(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _gather(values, indices, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, indices, rows = ctx.saved_tensors
        of_values = of_rows = None
        if ctx.needs_input_grad[0]:
            of_values = _Dots.apply(grads[0], indices, rows).to(values.dtype)
        if ctx.needs_input_grad[2]:
            of_rows = _Scatter.apply(values, grads[0], indices, len(rows)).to(rows.dtype)
        return of_values, None, of_rows

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        values, indices, rows = ctx.saved_tensors
        return _sum(
            None if tangents[0] is None else _Gather.apply(tangents[0], indices, rows),
            None if tangents[2] is None else _Gather.apply(values, indices, tangents[2]),
        ).to(rows.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        return _mapped(_Gather.apply, info.batch_size, in_dims, inputs, whole=2)


class _Dots(_Product):
    """`grad [n, d]`, `indices [n, k]`, `rows [m, d] -> [n, k]` in float32 or float64."""

    @staticmethod
    def forward(grad: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _dots(grad, indices, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, indices, rows = ctx.saved_tensors
        of_grad = of_rows = None
        if ctx.needs_input_grad[0]:
            of_grad = _Gather.apply(grads[0], indices, rows).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            of_rows = _Scatter.apply(grads[0], grad, indices, len(rows)).to(rows.dtype)
        return of_grad, None, of_rows

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        grad, indices, rows = ctx.saved_tensors
        return _sum(
            None if tangents[0] is None else _Dots.apply(tangents[0], indices, rows),
            None if tangents[2] is None else _Dots.apply(grad, indices, tangents[2]),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        return _mapped(_Dots.apply, info.batch_size, in_dims, inputs, whole=2)


class _Scatter(_Product):
    """`values [n, k]`, `grad [n, d]`, `indices [n, k] -> [m, d]` in float32 or float64."""

    @staticmethod
    def forward(
        values: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor, m: int
    ) -> torch.Tensor:
        return _scatter(values, grad, indices, m)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, grad, indices = ctx.saved_tensors
        of_values = of_grad = None
        if ctx.needs_input_grad[0]:
            of_values = _Dots.apply(grad, indices, grads[0]).to(values.dtype)
        if ctx.needs_input_grad[1]:
            of_grad = _Gather.apply(values, indices, grads[0]).to(grad.dtype)
        return of_values, of_grad, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        values, grad, indices = ctx.saved_tensors
        return _sum(
            None if tangents[0] is None else _Scatter.apply(tangents[0], grad, indices, *ctx.rest),
            None
            if tangents[1] is None
            else _Scatter.apply(values, tangents[1], indices, *ctx.rest),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        # Each problem of the batch has a matrix of its own, so doing them at once saves nothing.
        return _one_by_one(_Scatter.apply, info.batch_size, in_dims, inputs), 0


def _sum(*parts: torch.Tensor | None) -> torch.Tensor:
    found = [part for part in parts if part is not None]
    return found[0] if len(found) == 1 else found[0] + found[1]


def _mapped(
    apply: Callable[..., torch.Tensor],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[torch.Tensor, ...],
    whole: int,
) -> tuple[torch.Tensor, int]:
    """Solve a batch of problems as one problem with more positions.

    If the problems differ in their matrix, the input with number `whole`, each is solved by itself.
    """
    if in_dims[whole] is not None:
        return _one_by_one(apply, size, in_dims, inputs), 0
    flat = []
    for number, (tensor, dim) in enumerate(zip(inputs, in_dims, strict=True)):
        if number != whole:
            first = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            tensor = first.flatten(0, 1)
        flat.append(tensor)
    return apply(*flat).unflatten(0, (size, -1)), 0


def _one_by_one(
    apply: Callable[..., torch.Tensor],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> torch.Tensor:
    return torch.stack(
        [
            apply(
                *(a if d is None else a.select(d, i) for a, d in zip(inputs, in_dims, strict=True))
            )
            for i in range(size)
        ]
    )
