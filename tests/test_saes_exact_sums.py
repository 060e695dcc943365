"""Exact sums are rounded once, however much cancels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from qwen_scope_lens.saes.exact.dots import rounded_sums
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.topk import encode_topk


def rounded(exact: Fraction) -> float:
    """The nearest float32, with ties to even, found among the neighbours of a guess."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(s * np.inf), dtype=np.float32) for s in (-1, 1)]
    near = [guess, *(np.nextafter(a, guess, dtype=np.float32) for a in around), *around]
    return float(
        min(near, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.int32)) & 1))
    )


def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.double() * w.double()


@pytest.mark.parametrize("cancels", [1.0, 1e8, 1e15, 1e25, 1e33])
def test_sums_are_rounded_once(cancels: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(30, 101), torch.randn(30, 101)
    x[:, :50] *= cancels**0.5
    w[:, :50] *= cancels**0.5
    x[:, 50:100], w[:, 50:100] = x[:, :50], -w[:, :50]  # all of it cancels but the last
    x[:, 50:100] = x[:, 50:100][:, torch.randperm(50)]
    w[:, 50:100] = -w[:, :50]
    x[:, 50:100] = x[:, :50]
    x[::2, 7] *= 1 + 2**-20  # or hardly
    terms = products(x, w)[:, torch.randperm(101)]
    want = [rounded(sum(map(Fraction, row), Fraction())) for row in terms.tolist()]
    assert rounded_sums(terms).tolist() == want


def test_between_two_numbers() -> None:
    """Sums exactly in the middle of two numbers, or off it by less than float64 can show."""
    half, rows = 2.0**-24, []
    for little in (0.0, 2.0**-80, -(2.0**-80), 2.0**-140, -(2.0**-140)):
        rows += [[1.0, half, little], [1.0, 3 * half, little], [-1.0, -half, little]]
        rows += [[2.0**60, 1.0, half, little, -(2.0**60)]]
    terms = torch.tensor([row + [0.0] * (5 - len(row)) for row in rows], dtype=torch.float64)
    want = [rounded(sum(map(Fraction, row), Fraction())) for row in terms.tolist()]
    assert rounded_sums(terms).tolist() == want


def exact_selection(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int) -> list[int]:
    scores = []
    for row, add in zip(products(x, rows).tolist(), bias.double().tolist(), strict=True):
        scores.append(rounded(sum(map(Fraction, row), Fraction(add))))
    order = sorted(range(len(scores)), key=lambda f: (-scores[f], f))
    return sorted(f for f in order[:k] if scores[f] > 0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cancels", [1e9, 1e15, 1e22])
@pytest.mark.parametrize("n", [1, 3])
def test_the_selection_is_exact_whatever_cancels(
    cancels: float, n: int, precision: torch.dtype
) -> None:
    torch.manual_seed(1)
    d, d_sae, k = 16, 60, 5
    rows = torch.randn(d_sae, 2 * d + 1)
    rows[:, d : 2 * d] = -rows[:, :d]
    x = torch.randn(n, 2 * d + 1)
    x[:, :d] *= cancels
    x[:, d : 2 * d] = x[:, :d]
    rows[:, 2 * d] = torch.linspace(1, 1 + 2e-6, d_sae)[torch.randperm(d_sae)]
    x[:, 2 * d] = 1
    bias = torch.zeros(d_sae)
    values, indices = encode_topk(x, Encoder(rows, bias), k, precision)
    for i in range(n):
        chosen = sorted(indices[i][values[i] > 0].tolist())
        assert chosen == exact_selection(x[i], rows, bias, k)
