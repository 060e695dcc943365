"""Sums of products of float32 numbers, as if computed exactly and rounded once to float32.

A product of two float32 numbers is exact in float64; their sum is not. Three steps, from cheap to
dear, each with a bound that says where it suffices:

1. The sum in float64, off by at most `n 2^-53` times the sum of the magnitudes. Where everything
   within that distance rounds to the same float32, that is the result.
2. A sum that keeps what each addition loses (Knuth's two-sum, pair by pair). What it still loses is
   `n 2^-100` times the magnitudes: it tells more apart by a factor of 10^14.
3. Whole numbers in Python, exact whatever cancels: milliseconds for each.
"""

from __future__ import annotations

from fractions import Fraction

import torch

__all__ = ["rounded_sums"]


def rounded_sums(terms: torch.Tensor) -> torch.Tensor:
    """float64 `[p, n]`, each the product of two float32 numbers or one -> float32 sums `[p]`."""
    rough, size = terms.sum(-1), terms.abs().sum(-1)
    error = size * (terms.shape[-1] * 2.0**-53 * 1.01)
    low, high = (rough - error).float(), (rough + error).float()
    out = rough.float()
    open_ = (low != high) & rough.isfinite()
    if not bool(open_.any()):
        return out
    where = open_.nonzero().squeeze(1)
    chosen = terms[where]
    total, lost = _sum_of_pairs(chosen)
    error = size[where] * (terms.shape[-1] * 2.0**-100)
    low, high = _rounded(total, lost - error), _rounded(total, lost + error)
    out[where] = low
    for place in (low != high).nonzero().squeeze(1).tolist():
        exact = sum(map(Fraction, chosen[place].tolist()), Fraction())
        out[where[place]] = _of_fraction(exact)
    return out


def _sum_of_pairs(terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of `[p, n]` in float64, and what rounding took from it. `[p]` both."""
    lost = terms.new_zeros(len(terms))
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = torch.cat([terms, terms.new_zeros((len(terms), 1))], 1)
        a, b = terms[:, ::2], terms[:, 1::2]
        terms, less = _two_sum(a, b)
        lost = lost + less.sum(-1)
    return terms[:, 0], lost


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a + b` rounded, and exactly what the rounding took."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _rounded(total: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """`total + lost` rounded once to float32: first to float64 with an odd last bit where that is
    inexact, which no later rounding to fewer bits can mistake for the middle of two numbers."""
    near, rest = _two_sum(total, lost)
    bits = near.view(torch.int64)
    step = torch.where((rest > 0) == (near > 0), 1, -1)
    nudged = (rest != 0) & (bits % 2 == 0)
    return torch.where(nudged, bits + step, bits).view(torch.float64).float()


def _of_fraction(exact: Fraction) -> float:
    """Rounded once to float32, ties to even."""
    near = float(exact)  # correctly rounded to float64
    rest = exact - Fraction(near)
    sign = (rest > 0) - (rest < 0)
    parts = (
        torch.tensor([number], dtype=torch.float64)
        for number in (near, sign * abs(near) * 2.0**-60)
    )
    return float(_rounded(*parts)) if near else 0.0
