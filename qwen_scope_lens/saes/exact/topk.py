"""Exact top-k encode, on the device of the tensors.

`encode_topk` chooses the precision of the first pass, and what happens to positions that the first
pass does not settle. This module works on tensors and knows no SAELens object.
"""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import torch

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes.exact.certified import (
    U,
    approximate,
    are_few,
    clear_scores,
    select,
    select_few,
    tokens_per_block,
)
from qwen_scope_lens.saes.exact.dots import all_dots, exact_scores, exact_topk, pair_dots
from qwen_scope_lens.saes.exact.encoder import Encoder, Snapshot
from qwen_scope_lens.saes.exact.gather import dots, gather_decode
from qwen_scope_lens.saes.exact.pairs import pick, sorted_rows
from qwen_scope_lens.saes.exact.transforms import untracked

__all__ = ["encode_topk", "exact_topk", "first_pass", "require_finite"]

_COUNTS = (1, 2, 4, 12, 24, 48, 96)
"""The numbers of positions for which the two first passes are compared. The choice changes at one
of them."""

_ON_GPU = 24
"""The fewest positions for a bfloat16 first pass on a GPU. This has never been measured."""

_NEVER = 2**62
_CLEARLY = 1.2
"""bfloat16 must be faster by this factor, because it leaves a few more candidates to re-score."""

_MOST_BITS = 2**31 - 1

_CROWDED = 5.0
"""From this many candidates per k on, another centre is tried. A good centre gives 2 to 4."""


def encode_topk(
    x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of each position. `x [n, d_in]` -> float32 values and int32 indices, both `[n, k]`.

    Values descend, and equal values are ordered by ascending index. They are differentiable in `x`.
    `precision` overrides the choice of the first pass; the result does not depend on it.
    """
    if k > encoder.d_sae:
        raise ValueError(f"k={k} of {encoder.d_sae} features; expected k <= d_sae")
    if untracked(x):
        return _encode(x, encoder, k, precision)
    found: tuple[torch.Tensor, torch.Tensor] = _TopK.apply(x, encoder, k, precision)
    return found


def _encode(
    x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    # Under autocast, products would have fewer bits and other dtypes.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        exact = x.float()
        precision = precision or first_pass(len(x), x.device.type, encoder.keeps_half)
        size = tokens_per_block(encoder.snapshot, precision)
        if len(x) <= size:
            return _encode_block(exact, encoder, k, precision)
        parts = [_encode_block(block, encoder, k, precision) for block in exact.split(size)]
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, indices


class _TopK(torch.autograd.Function):
    """The top k for autograd: a positive value is the dot with its row, plus the bias."""

    @staticmethod
    def forward(
        x: torch.Tensor, encoder: Encoder, k: int, precision: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_finite(x, x.shape[:-1])  # under vmap, the numbers cannot be seen before
        return _encode(x, encoder, k, precision)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.rows, ctx.dtype = inputs[1].rows, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        values, indices = ctx.saved_tensors
        into = gather_decode(grads[0] * (values > 0), indices, ctx.rows)
        return into.to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        values, indices = ctx.saved_tensors
        assert tangents[0] is not None
        return dots(tangents[0].float(), indices, ctx.rows) * (values > 0), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *rest: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
        assert in_dims[0] is not None  # x is the only tensor
        found = _TopK.apply(x.movedim(in_dims[0], 0).flatten(0, 1), *rest)
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0)


def first_pass(tokens: int, device: str, keeps_half: bool = False) -> torch.dtype:
    """The precision in which a first pass over this many positions is fastest here."""
    return torch.bfloat16 if tokens >= half_from(device, keeps_half) else torch.float32


@cache
def half_from(device: str, keeps_half: bool) -> int:
    """The number of positions from which a bfloat16 first pass is clearly faster than float32.

    Its time includes converting the weights, unless a copy is kept. Measured once per process, in
    0.2 s.
    """
    if device != "cpu":
        return _ON_GPU
    with torch.no_grad():
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        rows, bias = torch.ones(8192, 1024, **kind), torch.zeros(8192, **kind)
        encoder = Encoder(rows, bias, keeps_half).snapshot
        found = _NEVER
        for count in reversed(_COUNTS):
            x = torch.ones(count, 1024, **kind)
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
    """`encode_topk` for one block of positions, float32 `[n, d_in]`."""
    now, found = encoder.snapshot, None
    if are_few(now, x, precision):
        every = all_dots(now.rows, x)
        if (clear := clear_scores(now, x, every, k)) is not None:
            encoder.settled["float32"] += len(x)
            return _in_order(*clear)
        found = select_few(now, x, every, k)
    if found is None or not bool(found.settled.all()):
        found = select(now, x, k, precision)
    poorly = precision == torch.bfloat16 and found.crowding > _CROWDED
    if poorly and (encoder.recentre(x) or encoder.snapshot is not now):
        now = encoder.snapshot
        found = select(now, x, k, precision)
    encoder.crowding, settled = found.crowding, found.settled
    values, indices = _valued(x, now, found.indices, found.dots)
    encoder.settled[str(precision).removeprefix("torch.")] += int(settled.sum())
    rest = (~settled).nonzero().squeeze(1)
    if not len(rest):
        return values, indices
    if precision == torch.bfloat16:
        # A float32 first pass is twice as large, so it takes half the positions at a time.
        parts = [
            _encode_block(part, encoder, k, torch.float32)
            for part in x[rest].split(tokens_per_block(now, torch.float32))
        ]
        values[rest], indices[rest] = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        # Rows that are equal, such as those of pads, are computed once.
        rows, back = x[rest].unique(dim=0, return_inverse=True)
        best = exact_topk(rows, now.rows, now.bias, k)[1]
        exact_values, exact_indices = _valued(rows, now, best, None)
        values[rest], indices[rest] = exact_values[back], exact_indices[back]
        encoder.settled["float64"] += len(rest)
    return values, indices


def _valued(
    x: torch.Tensor, encoder: Snapshot, chosen: torch.Tensor, dots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and indices of selected features, in the order of SparseCodes.

    Values are within float32 rounding and do not depend on the pass that selected the features.
    Each is one float32 dot, summed in a fixed order, or the exact score where that order may have
    lost the sign or overflowed.
    """
    token, column = (chosen >= 0).nonzero(as_tuple=True)
    feature = chosen[token, column]
    bias = pick(encoder.bias.float(), feature)
    if dots is None:
        value = pair_dots(encoder.rows, x, token, feature) + bias
    else:
        value = dots[token, column] + bias
    doubt = pick(x.norm(dim=1), token) * pick(encoder.norms, feature) * (1.1 * encoder.d_in * U)
    unsure = ~(value > doubt + 2 * U * bias.abs())
    unsure |= ~value.isfinite()
    if bool(unsure.any()):
        t, f = token[unsure], feature[unsure]
        value[unsure] = exact_scores(encoder.rows, encoder.bias, x, t, f).float()
        if not bool(value.isfinite().all()):
            raise NotFinite(
                "pre-activations exceed float32 although the inputs are finite: expected residuals"
                " and weights whose products stay below 3.4e38, found norms up to"
                f" {float(x.norm(dim=1).max())}"
            )
    values = x.new_zeros(chosen.shape)
    values[token, column] = value
    return _in_order(values, chosen.clamp_min(0))


def _in_order(values: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted by descending value, and equal values by ascending feature; padding is 0 and 0.

    Floats that are not negative are in the order of their bits, so a pair is sorted as one number.
    """
    keys = (_MOST_BITS - values.view(torch.int32).long()) << 32 | features
    keys = sorted_rows(keys)
    values = (_MOST_BITS - (keys >> 32)).to(torch.int32).view(torch.float32)
    return values, (keys & 0xFFFFFFFF).to(torch.int32)


def require_finite(flat: torch.Tensor, shape: torch.Size) -> None:
    """Refuse NaN and infinity in `[n, d_in]`. The message names positions in `shape`."""
    if math.isfinite(flat.detach().sum(dtype=torch.float32)):  # NaN and infinity stay in any sum
        return
    # Block by block: the mask of a block is small, while one of x would take a quarter of its size.
    blocks = [block.isfinite().all(dim=-1) for block in flat.split(1024)]
    good = torch.cat([flat.new_zeros(0, dtype=torch.bool), *blocks])
    if bool(good.all()):
        return
    places = (~good).reshape(shape).nonzero().tolist()
    shown = ", ".join(str(tuple(place)) for place in places[:5])
    raise NotFinite(
        f"x has NaN or infinity at {len(places)} of {len(good)} positions: {shown}"
        f"{', ..' if len(places) > 5 else ''}; expected finite residuals. Mask these positions, "
        "or run the model in bfloat16 or float32 if it overflowed in float16"
    )
