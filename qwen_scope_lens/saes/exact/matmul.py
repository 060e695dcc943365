"""Products of float32 matrices, always in true float32, by the fastest library on this machine.

The error bounds of the certified top-k hold for true float32 only, but torch can be told to
multiply float32 in fewer bits (`torch.set_float32_matmul_precision`). As for speed, the BLAS that
torch was built with is not the fastest everywhere: on AMD, MKL uses half of a core, while oneDNN,
which torch brings along, uses all of it.
"""

from __future__ import annotations

import os
import threading
import time
from functools import cache

import torch

from qwen_scope_lens.saes.exact.dots import all_dots

__all__ = ["BY_DOTS", "full_float32", "full_sums", "product"]

BY_DOTS = 2
"""Up to this many positions, reading the weights from memory takes most of the time. `all_dots`
reads them once, and costs two thirds of a matrix product for one position."""

_CLEARLY = 1.1
"""oneDNN is used when it is faster than the BLAS by this factor."""

_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""These environment variables make oneDNN multiply in fewer bits without torch knowing."""

_TILE = 1024
"""How many rows are converted to float64 at a time."""


def product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x @ rows.T` with the error of float32, in any order of summation, also under autocast.

    float32 `x [n, d]`, `rows [m, d] -> [n, m]`
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
    return _by_onednn(x, rows) if onednn_wins() else _by_blas(x, rows)


class _FullSums:
    """Within it, bfloat16 products on a GPU keep their sums in float32, as their bound needs.

    By itself torch lets a product whose sums are split add the parts in bfloat16. That setting
    belongs to the process, so it is put back when the last thread has left.
    """

    def __init__(self) -> None:
        self._inside, self._before, self._turn = 0, True, threading.Lock()

    def __enter__(self) -> None:
        with self._turn:
            if not self._inside:
                self._before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._turn:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self._before


full_sums = _FullSums()


def full_float32(device: str) -> bool:
    """Whether torch multiplies float32 matrices on this device in true float32."""
    if device == "cpu" and any(os.environ.get(name, "STRICT") != "STRICT" for name in _VARIABLES):
        return False
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # as in torch 2.8
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


def _by_blas(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x @ rows.T


def _by_onednn(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # torch's compiler emits this for a linear layer. The public function needs converted weights.
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, None, "none", [], "")
    return out


@cache
def onednn_wins() -> bool:
    """Whether oneDNN is faster than the BLAS here. Measured once per process, in 20 ms."""
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
