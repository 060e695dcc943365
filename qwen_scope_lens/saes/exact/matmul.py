"""Products of float32 matrices: truly float32, and by the quickest road of this machine.

What bounds errors needs both. torch may be told to multiply float32 in fewer bits
(`torch.set_float32_matmul_precision`), and the BLAS it was built with is not the fastest
everywhere: MKL leaves half of an AMD core unused, where oneDNN, which torch brings along, does not.
"""

from __future__ import annotations

import os
import time
from functools import cache

import torch

from qwen_scope_lens.saes.exact.dots import all_dots

__all__ = ["BY_DOTS", "full_float32", "product"]

BY_DOTS = 2
"""Up to so many positions the weights' way from memory is what takes time, and `all_dots` reads
them once, at two thirds of the cost of a matrix product for one position."""

_CLEARLY = 1.1
"""How much quicker oneDNN has to be."""

_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""By which oneDNN may be told the same behind torch's back."""

_TILE = 1024
"""Rows in float64 at a time."""


def product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x @ rows.T` with the error of float32, in some order of summation; also under autocast.

    float32 `[n, d]`, `[m, d] -> [n, m]`
    """
    with torch.autocast(x.device.type, enabled=False):
        return _product(x, rows)


def _product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if not full_float32(x.device.type):
        tiles = [(x.double() @ tile.double().T).float() for tile in rows.split(_TILE)]
        return torch.cat(tiles, 1)
    if x.is_cuda or not x.numel() or not rows.numel():
        return _by_blas(x, rows)
    if len(x) <= BY_DOTS:
        return all_dots(rows, x)
    return _by_onednn(x, rows) if _onednn_wins() else _by_blas(x, rows)


def full_float32(device: str) -> bool:
    """Whether products of float32 matrices on this device are float32 all through."""
    if device == "cpu" and any(os.environ.get(name, "STRICT") != "STRICT" for name in _VARIABLES):
        return False
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch 2.8
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


def _by_blas(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x @ rows.T


def _by_onednn(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # What torch's compiler emits for a linear layer. The public road wants the weights converted.
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, None, "none", [], "")
    return out


@cache
def _onednn_wins() -> bool:
    """Measured once per process: 20 ms."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known:
        return False
    took = dict.fromkeys((_by_blas, _by_onednn), float("inf"))
    with torch.no_grad():
        x, rows = (torch.ones(m, 1024, dtype=torch.float32, device="cpu") for m in (64, 2048))
        for _ in range(5):
            for road in took:
                start = time.thread_time()
                road(x, rows)
                took[road] = min(took[road], time.thread_time() - start)
    return took[_by_blas] > _CLEARLY * took[_by_onednn]
