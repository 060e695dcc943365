"""Triton kernels for CUDA, where torch has no product for the job or a slower one.

They are the gather decode, and the dots of chosen pairs: the re-scoring of an encode, and the
gradient of the decode. The plain PyTorch code is the reference for both. Triton is imported with
this module where there is a GPU; if `TRITON_INTERPRET=1` is set before, the kernels run on a CPU.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

__all__ = ["TILES", "Tiles", "available", "decode", "pair_dots"]


@dataclass(frozen=True)
class Tiles:
    """How the dots of pairs are cut: so many pairs per program, one after the other, in steps of
    `depth` numbers, on so many warps. Pairs that follow each other share a position, whose row
    then stays in the first-level cache."""

    pairs: int = 8
    depth: int = 1024
    warps: int = 4


TILES = Tiles()
"""Chosen on paper: `benchmarks/gpu.py` searches for better ones on a GPU."""

# mypy: disable-error-code="no-untyped-def"
# (The arguments of a kernel are pointers and numbers, and Triton reads annotations in its own way.)

_WANTED = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"

if _WANTED and importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

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
    def _pair_dots_kernel(
        x, rows, token, feature, out, n, d_in, pairs: tl.constexpr, block_d: tl.constexpr
    ):
        """`out[p] = x[token[p]] . rows[feature[p]]` for the pairs of one program"""
        first = tl.program_id(0).to(tl.int64) * pairs
        for p in range(first, tl.minimum(first + pairs, n)):
            t = tl.load(token + p).to(tl.int64)
            row = tl.load(feature + p).to(tl.int64)
            total = tl.zeros((block_d,), tl.float32)
            for start in range(0, d_in, block_d):
                d = start + tl.arange(0, block_d)
                a = tl.load(x + t * d_in + d, d < d_in, 0.0).to(tl.float32)
                total += a * tl.load(rows + row * d_in + d, d < d_in, 0.0).to(tl.float32)
            tl.store(out + p, tl.sum(total, 0))


def available(device: torch.device) -> bool:
    """Whether these kernels run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


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


def pair_dots(
    rows: torch.Tensor,
    x: torch.Tensor,
    token: torch.Tensor,
    feature: torch.Tensor,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Dots of chosen pairs of rows, in float32 and in an order of summation that depends on d only.

    `rows [d_sae, d]`, `x [n, d]`, `token [p]` and `feature [p]` -> `[p]`. By default with `TILES`.
    """
    n, tiles = len(token), tiles or TILES
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        tensors = (x.contiguous(), rows, token, feature, out)
        _pair_dots_kernel[(-(-n // tiles.pairs),)](
            *tensors, n, rows.shape[1], tiles.pairs, tiles.depth, num_warps=tiles.warps
        )
    return out
