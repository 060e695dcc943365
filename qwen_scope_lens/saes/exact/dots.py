"""Scores of single (position, feature) pairs: fast in float32, or exact.

`certified.py` chooses the pairs and decides with the scores. Exact scores need exact sums. A
product of two float32 numbers is exact in float64, but a sum of such products is not.
`rounded_sums` takes three steps, the cheap ones first, each with a bound that shows whether it is
enough:

1. The sum in float64. Its error is at most `n 2^-53` times the sum of the magnitudes. If all
   numbers within that distance round to the same float32, that is the result.
2. A sum that keeps what each addition loses (Knuth's two-sum, pair by pair). It can still lose
   `n 2^-100` times the sum of the magnitudes, so it is finer by a factor of 10^14.
3. Whole numbers in Python. They are exact however much cancels, and take milliseconds per sum.
"""

from __future__ import annotations

import warnings
from fractions import Fraction
from functools import cache, lru_cache

import torch

from qwen_scope_lens.saes.exact import kernels
from qwen_scope_lens.saes.exact.encoder import norm_above
from qwen_scope_lens.saes.exact.pairs import on_cpu, pick

__all__ = ["all_dots", "exact_scores", "exact_topk", "pair_dots", "part_dots", "rounded_sums"]

_ELEMENTS = 2**20
"""How many numbers a working buffer holds: 8 MiB in float64."""

_ON_GPU = 2**24
"""The same on a GPU, where each buffer costs a few launches. This has never been measured."""

_RARE = 8
"""With fewer than one pair per this many encoder rows, positions rarely share a row, and sorting
the pairs by row costs more than it saves."""

_CACHED = 16 * 2**20
"""The rows of an encoder of at most this many bytes stay in the CPU's cache anyway."""


def pair_dots(
    rows: torch.Tensor, x: torch.Tensor, token: torch.Tensor, feature: torch.Tensor
) -> torch.Tensor:
    """The float32 dots `x[token] . rows[feature]` of pairs in ascending position.

    `rows [d_sae, d]`, float32 `x [n, d]`, `token [p]` and `feature [p]` -> `[p]`

    Each dot is summed in an order that depends on d only, so the value of a pair does not depend on
    which other pairs are computed with it.
    """
    if not len(token):
        return x.new_zeros(0)
    if kernels.available(x.device):
        return kernels.pair_dots(rows, x, token, feature)
    if not on_cpu(x):
        return part_dots(rows, x, token, feature, 1).view(-1)
    full = rows.dtype == torch.float32
    if full and (_RARE * len(token) < len(rows) or rows.nbytes <= _CACHED):
        return _dots(x, rows, _starts(token, len(x)), feature)
    # The pairs are sorted by feature: each encoder row is read once, the positions stay in cache.
    order = (feature * len(x) + token).argsort()
    token, feature = pick(token, order), pick(feature, order)
    out = x.new_empty(len(token))
    if full:
        return out.scatter_(0, order, _dots(rows, x, _starts(feature, len(rows)), token))
    wanted, local = feature.unique_consecutive(return_inverse=True)
    dots = []
    step = max(1, 4 * _ELEMENTS // rows.shape[1])
    for start in range(0, len(wanted), step):
        inside = (local >= start) & (local < start + step)
        tile = rows[wanted[start : start + step]].float()
        starts = _starts(local[inside] - start, len(tile))
        dots.append(_dots(tile, x, starts, token[inside]))
    return out.scatter_(0, order, torch.cat(dots))


def part_dots(
    rows: torch.Tensor, x: torch.Tensor, token: torch.Tensor, feature: torch.Tensor, parts: int
) -> torch.Tensor:
    """As `pair_dots`, but each dot as `parts` dots over equal pieces of the width. `[p, parts]`

    The pairs may come in any order. This is fast for a few pairs.
    """
    pieces, width = torch.arange(parts, device=x.device), x.shape[1] // parts
    sampled = rows.dtype == torch.float32 and on_cpu(x)
    found = [x.new_zeros((0, parts))]
    step = max(1, (_ELEMENTS if on_cpu(x) else _ON_GPU) // x.shape[1])
    for t, f in zip(token.split(step), feature.split(step), strict=True):
        if sampled:  # each piece of a position is a row of its own, with a single dot
            starts = torch.arange(len(t) * parts + 1, device=x.device)
            column = (f[:, None] * parts + pieces).view(-1)
            dots = _dots(x[t].view(-1, width), rows.view(-1, width), starts, column)
        else:
            dots = (x[t] * rows[f].float()).view(-1, width).sum(-1)
        found.append(dots.view(-1, parts))
    return torch.cat(found)


def all_dots(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x @ rows.T` for a few positions, reading the rows once. For float32 on a CPU.

    `rows [d_sae, d]`, `x [n, d] -> [n, d_sae]`
    """
    d_sae, n = len(rows), len(x)
    return _dots(rows, x, *_every_pair(d_sae, n)).view(d_sae, n).T


@lru_cache(maxsize=8)
def _every_pair(rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row begins among all pairs, and the position of each pair, for `_dots`."""
    with torch.inference_mode(False):
        starts = torch.arange(0, rows * n + 1, n, dtype=torch.int32, device="cpu")
        return starts, torch.arange(n, dtype=torch.int32, device="cpu").repeat(rows)


def _starts(row: torch.Tensor, rows: int) -> torch.Tensor:
    """The place where each row begins among pairs sorted by row. `[rows + 1]`"""
    starts = torch.zeros(rows + 1, dtype=torch.long, device=row.device)
    starts[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return starts


def _dots(
    left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """Dots of chosen pairs of rows (a sampled dense-dense product).

    Row i of `left` is multiplied with the rows `column[starts[i] : starts[i + 1]]` of `right`.
    """
    _say_beta_once()
    values = left.new_zeros(len(column))
    shape = (len(left), len(right))
    pattern = torch.sparse_csr_tensor(
        starts, column, values, shape, check_invariants=False, device=left.device
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


@cache
def _say_beta_once() -> None:
    """Use up torch's warning that CSR is in beta, which it gives once per process.

    Python's warning filters belong to all threads, so they are changed once here and not in every
    product.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = torch.zeros(1, dtype=torch.long, device="cpu")
        torch.sparse_csr_tensor(
            torch.arange(2, device="cpu"), one, one.float(), (1, 1), device="cpu"
        )


def exact_scores(
    rows: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    token: torch.Tensor,
    feature: torch.Tensor,
) -> torch.Tensor:
    """The exact dots plus bias of pairs, rounded once to float32 and returned as float64. `[p]`"""
    out = torch.empty(len(token), dtype=torch.float64, device=x.device)
    # On a CPU, a buffer stays in the cache.
    step = max(1, (_ELEMENTS // 8 if on_cpu(x) else _ON_GPU) // x.shape[1])
    for start in range(0, len(token), step):
        t, f = token[start : start + step], feature[start : start + step]
        row, near = pick(rows, f), pick(x, t)
        add = bias[f].double()
        terms = row.double().mul_(near)
        score = terms.sum(-1).add_(add)
        size = norm_above(row).double() * norm_above(near) + add.abs()
        error = size * ((terms.shape[1] + 1) * 2.0**-53 * 1.01)
        open_ = ((score - error).float() != (score + error).float()).nonzero().squeeze(1)
        score = score.float().double()
        if len(open_):
            score[open_] = rounded_sums(torch.cat([terms[open_], add[open_, None]], 1)).double()
        out[start : start + step] = score
    return out


def exact_topk(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k by its definition, slowly: all scores, rounded to float32 and sorted stably.

    `x [n, d_in]`, `rows [d_sae, d_in]`, `bias [d_sae]` -> float32 values and int64 indices, both
    `[n, k]`, with 0 and -1 where fewer scores are positive.

    Scores are summed in float64. Where that does not show how a score rounds, and it matters,
    `exact_scores` computes it. This is the reference in the tests, and the last resort for
    positions that no bound settles.
    """
    step = max(64, _ELEMENTS // rows.shape[1])
    tokens = max(1, _ELEMENTS // max(step, rows.shape[1]))
    values, indices = [x.new_zeros((0, k), dtype=torch.float32)], [x.new_zeros((0, k)).long()]
    for block in x.split(tokens):
        best = block.new_zeros((len(block), 0), dtype=torch.float32)
        where = torch.zeros((len(block), 0), dtype=torch.long, device=x.device)
        for start in range(0, len(rows), step):
            tile, add = rows[start : start + step].double(), bias[start : start + step].double()
            scores = block.double() @ tile.T + add
            size = block.double().norm(dim=1)[:, None] * tile.norm(dim=1) + add.abs()
            error = size * (1.02 * (rows.shape[1] + 2) * 2.0**-53)
            low, high = (scores - error).float(), (scores + error).float()
            line = torch.cat([best, low], 1).sort(dim=1, descending=True).values[:, k - 1 : k]
            line = line if line.shape[1] else torch.full_like(scores[:, :1], float("-inf"))
            token, feature = ((low != high) & (high >= line) & (high > 0)).nonzero(as_tuple=True)
            scores = scores.float()
            exact = exact_scores(rows, bias, block, token, start + feature)
            scores[token, feature] = exact.float()
            ids = torch.arange(start, start + len(tile), device=x.device)
            # Lower features stand first, so in a stable sort the lower one of equal scores wins.
            best = torch.cat([best, scores], 1)
            where = torch.cat([where, ids.expand(len(block), -1)], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, where = best[:, :k], where.gather(1, order)[:, :k]
        values.append(best.relu())
        indices.append(where.masked_fill(best <= 0, -1))
    return torch.cat(values), torch.cat(indices)


def rounded_sums(terms: torch.Tensor) -> torch.Tensor:
    """The sums of rows of float64 `[p, n]`, exact and then rounded once to float32 `[p]`.

    Each term is a float32 number, or the product of two.
    """
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
    """The sum of `[p, n]` in float64, and what rounding took from it. Both `[p]`."""
    lost = terms.new_zeros(len(terms))
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = torch.cat([terms, terms.new_zeros((len(terms), 1))], 1)
        a, b = terms[:, ::2], terms[:, 1::2]
        terms, less = _two_sum(a, b)
        lost = lost + less.sum(-1)
    return terms[:, 0], lost


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a + b` rounded, and the exact difference to `a + b`."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _rounded(total: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """`total + lost`, rounded once to float32.

    The sum is first rounded to float64, with an odd last bit if that is inexact. A later rounding
    to fewer bits then never mistakes it for the middle between two numbers.
    """
    near, rest = _two_sum(total, lost)
    bits = near.view(torch.int64)
    step = torch.where((rest > 0) == (near > 0), 1, -1)
    nudged = (rest != 0) & (bits % 2 == 0)
    return torch.where(nudged, bits + step, bits).view(torch.float64).float()


def _of_fraction(exact: Fraction) -> float:
    """A fraction rounded once to float32, with ties to even."""
    near = float(exact)  # Python rounds this correctly to float64
    rest = exact - Fraction(near)
    sign = (rest > 0) - (rest < 0)
    parts = (
        torch.tensor([number], dtype=torch.float64)
        for number in (near, sign * abs(near) * 2.0**-60)
    )
    return float(_rounded(*parts)) if near else 0.0
