"""Triton kernels for CUDA: the first pass of an encode, and the gather decode.

`candidates` multiplies tiles and keeps only the scores that reach the line of their position, so
there is never a tensor `[tokens, d_sae]` in device memory. `certified.py` decides among them as
after any other first pass. The plain PyTorch code is the reference for everything here. Triton is
imported with this module; if `TRITON_INTERPRET=1` is set before that, the kernels run on a CPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

__all__ = ["TILES", "Tiles", "available", "candidates", "decode", "dots"]


@dataclass(frozen=True)
class Tiles:
    """How the first pass is cut: `positions` by `features` scores per program, in steps of `depth`
    numbers, on so many warps."""

    positions: int = 64
    features: int = 128
    depth: int = 32
    warps: int = 4


TILES = Tiles()
"""Chosen on paper: `benchmarks/gpu.py` searches for better ones on a GPU."""

# mypy: disable-error-code="no-untyped-def"
# (The arguments of a kernel are pointers and numbers, and Triton reads annotations in its own way.)

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _candidates_kernel(
        x,
        rows,
        bias,
        outliers,
        weights,
        line,
        count,
        features,
        approx,
        n,
        d_in,
        d_sae,
        cap,
        half: tl.constexpr,
        interpreted: tl.constexpr,
        m: tl.constexpr,
        block_n: tl.constexpr,
        block_f: tl.constexpr,
        block_d: tl.constexpr,
    ):
        """Compute a tile `[block_n, block_f]` of scores and append those that reach the line."""
        t = tl.program_id(0) * block_n + tl.arange(0, block_n)
        f = tl.program_id(1) * block_f + tl.arange(0, block_f)
        t64, f64 = t.to(tl.int64), f.to(tl.int64)
        total = tl.zeros((block_n, block_f), tl.float32)
        for start in range(0, d_in, block_d):
            d = start + tl.arange(0, block_d)
            a_mask = (t[:, None] < n) & (d[None, :] < d_in)
            b_mask = (f[:, None] < d_sae) & (d[None, :] < d_in)
            a = tl.load(x + t64[:, None] * d_in + d[None, :], a_mask, 0.0)
            b = tl.load(rows + f64[:, None] * d_in + d[None, :], b_mask, 0.0)
            if half:
                a = a.to(tl.bfloat16)
                b = b.to(tl.bfloat16)
            if half and not interpreted:
                total = tl.dot(a, tl.trans(b), total)
            else:
                total = tl.dot(
                    a.to(tl.float32), tl.trans(b.to(tl.float32)), total, input_precision="ieee"
                )
        o = tl.arange(0, m)
        a = tl.load(outliers + t64[:, None] * m + o[None, :], (t < n)[:, None], 0.0)
        b = tl.load(weights + f64[:, None] * m + o[None, :], (f < d_sae)[:, None], 0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        total += tl.load(bias + f, f < d_sae, 0.0)[None, :]
        lines = tl.load(line + t, t < n, float("inf"))
        keep = (total >= lines[:, None]) & (f < d_sae)[None, :] & (t < n)[:, None]
        found = keep.to(tl.int32)
        base = tl.atomic_add(count + t, tl.sum(found, 1), t < n)
        slot = base[:, None] + tl.cumsum(found, 1) - 1
        keep = keep & (slot < cap)
        at = t64[:, None] * cap + slot
        tl.store(features + at, tl.broadcast_to(f[None, :], (block_n, block_f)), keep)
        tl.store(approx + at, total, keep)

    @triton.jit
    def _decode_kernel(values, indices, rows, out, k: tl.constexpr, d_in, block_d: tl.constexpr):
        """`out[t, block] = sum of values[t, j] * rows[indices[t, j], block]`"""
        t = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * block_d + tl.arange(0, block_d)
        total = tl.zeros((block_d,), tl.float32)
        for j in range(k):
            value = tl.load(values + t * k + j).to(tl.float32)
            row = tl.load(indices + t * k + j).to(tl.int64)
            total += value * tl.load(rows + row * d_in + d, d < d_in, 0.0).to(tl.float32)
        tl.store(out + t * d_in + d, total.to(out.dtype.element_ty), d < d_in)

    @triton.jit
    def _decode_backward_kernel(
        grad, indices, rows, out, k: tl.constexpr, d_in, block_d: tl.constexpr
    ):
        """`out[t, j] = grad[t] . rows[indices[t, j]]`"""
        t = tl.program_id(0).to(tl.int64)
        j = tl.program_id(1)
        row = tl.load(indices + t * k + j).to(tl.int64)
        total = tl.zeros((block_d,), tl.float32)
        for start in range(0, d_in, block_d):
            d = start + tl.arange(0, block_d)
            a = tl.load(grad + t * d_in + d, d < d_in, 0.0).to(tl.float32)
            total += a * tl.load(rows + row * d_in + d, d < d_in, 0.0).to(tl.float32)
        tl.store(out + t * k + j, tl.sum(total, 0))


def available(device: torch.device) -> bool:
    """Whether these kernels run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def candidates(
    x: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    outliers: torch.Tensor,
    weights: torch.Tensor,
    line: torch.Tensor,
    cap: int,
    half: bool,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scores of each position that are at least `line [n]`.

    Returns how many there are, `[n]`, and up to `cap` features and scores per position, both
    `[n, cap]`. Unused places hold feature -1, and the order of the entries has no meaning.

    `x` is float32 `[n, d_in]`, `rows [d_sae, d_in]`, and `bias` float32 `[d_sae]`. `outliers`,
    `[n, m]`, and `weights`, `[d_sae, m]`, are float32 and multiplied in float32 even with `half`.
    The result does not depend on `tiles` (by default `TILES`), apart from the order of sums.
    """
    n, d_in = x.shape
    d_sae, m = len(rows), 16
    pad = (0, m - outliers.shape[1])
    outliers = torch.nn.functional.pad(outliers, pad).contiguous()
    weights = torch.nn.functional.pad(weights, pad).contiguous()
    count = torch.zeros(n, dtype=torch.int32, device=x.device)
    features = torch.full((n, cap), -1, dtype=torch.int32, device=x.device)
    approx = torch.zeros((n, cap), dtype=torch.float32, device=x.device)
    tiles = tiles or TILES
    grid = (-(-n // tiles.positions), -(-d_sae // tiles.features))
    # The interpreter cannot multiply bfloat16, so there the rounded numbers go in as float32.
    interpreted = bool(triton.knobs.runtime.interpret)
    x = x.bfloat16() if half else x  # once, and not in every tile
    tensors = (x.contiguous(), rows, bias, outliers, weights, line, count, features, approx)
    sizes = (n, d_in, d_sae, cap)
    blocks = (tiles.positions, tiles.features, tiles.depth)
    _candidates_kernel[grid](*tensors, *sizes, half, interpreted, m, *blocks, num_warps=tiles.warps)
    return count, features, approx


def decode(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weighted sums of chosen rows, in the dtype of the rows.

    `values [n, k]`, `indices [n, k]`, `rows [d_sae, d_in] -> [n, d_in]`
    """
    n, k = values.shape
    d_in = rows.shape[1]
    out = rows.new_empty((n, d_in))
    if n:
        grid = (n, -(-d_in // 512))
        _decode_kernel[grid](values.contiguous(), indices.contiguous(), rows, out, k, d_in, 512)
    return out


def dots(grad: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Dots with chosen rows, in float32.

    `grad [n, d_in]`, `indices [n, k]`, `rows [d_sae, d_in] -> [n, k]`
    """
    n, k = indices.shape
    out = torch.empty((n, k), dtype=torch.float32, device=grad.device)
    if n:
        _decode_backward_kernel[(n, k)](
            grad.contiguous(), indices.contiguous(), rows, out, k, rows.shape[1], 512
        )
    return out
