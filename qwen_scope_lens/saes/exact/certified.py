"""The exact top-k of `ReLU(W x + b)`, found with the help of a fast, rounded product.

The score of a feature is the exact dot product of the stored numbers, rounded once to float32. The
k largest positive scores are selected, and of equal scores the lower index wins. The result does
not depend on how the work is cut into blocks. A block of positions goes through four steps:

1. *First pass.* A product in bfloat16 or float32 gives approximate scores `a`. Per position, their
   error is at most `E`.
2. *Candidates.* The features are cut into disjoint groups. The k-th largest of the groups' maxima,
   minus `E`, is a line that the k-th score cannot be below. A feature whose `a + E` is below that
   line cannot be selected; the others are candidates.
3. *Re-scoring.* The k best candidates are scored again in float32, which raises the line. Only
   candidates whose `a + E` still reaches the line are scored again, too.
4. *Decision.* The new scores have a float32 error bound of their own. The few features that it
   leaves contested around the k-th place are decided by exact sums.

A position with too many candidates is not settled here. The caller repeats it with a tighter first
pass, and in the end with `exact_topk`.

The bound of a bfloat16 first pass, with `x = c + r + o` as in `Centre`, hats for rounded tensors
and measured norms, is a sum of `|r| |w - w^| + |r - r^| |w^|` (Cauchy and Schwarz), `2 K u` times
the sums of magnitudes (accumulation of K terms in any order, chopped or rounded; u = 2^-24),
`2^-16 |o| |w_o|` (products of the split outliers that are left out), `2^-8 |a|` (for an output in
bfloat16), and what underflow can hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_scope_lens.saes.exact import kernels
from qwen_scope_lens.saes.exact.dots import all_dots, exact_scores, pair_dots
from qwen_scope_lens.saes.exact.encoder import EXTRA, TILE, Snapshot, norm_above
from qwen_scope_lens.saes.exact.matmul import BY_DOTS, product
from qwen_scope_lens.saes.exact.pairs import Grid, Pairs, Scored, at_least, kth_largest, places

__all__ = [
    "BLOCK_BYTES",
    "Selection",
    "approximate",
    "clear_scores",
    "select",
    "tokens_per_block",
]

U = 2.0**-24
TINY = 2.0**-120
BLOCK_BYTES = 64 * 2**20
"""The size of the first pass over one block of positions. Its other tensors are smaller."""

_AT_ONCE = 2**20
"""How many approximate scores are compared at a time, so that they stay in the CPU's cache."""

_SPARE = 32
"""How many features beyond k may be contested when all dots are computed."""

_HARDLY_MORE = 1.25
"""Up to this many candidates per k, all are re-scored at once: to sort some out takes longer."""

_READS_ALL, _SOME_MORE = 2, 4.0
"""If the best k of all positions are at least half as many as there are features, nearly all of the
encoder is read from memory for them, and a second reading for the others would cost more than
up to four candidates per k at once."""


@dataclass(frozen=True)
class Selection:
    """The result of a first pass and its re-scoring for n positions."""

    indices: torch.Tensor  # int64 [n, k], in any order, -1 where fewer scores are positive
    dots: torch.Tensor | None  # float32 [n, k]: x with the selected rows, if computed on the way
    settled: torch.Tensor  # bool [n]: whether the position's selection is certain
    crowding: float  # the number of candidates divided by k: how tight the bound was


def tokens_per_block(d_sae: int, precision: torch.dtype) -> int:
    """The number of positions of one first pass, so that it fits into BLOCK_BYTES."""
    return max(1, min(2048, BLOCK_BYTES // (d_sae * precision.itemsize)))


def select(encoder: Snapshot, x: torch.Tensor, k: int, precision: torch.dtype) -> Selection:
    """The k best features of each position, as far as the first pass can tell. `x [n, d_in]`"""
    if 0 < len(x) <= BY_DOTS and precision == encoder.rows.dtype == torch.float32 and not x.is_cuda:
        few = _select_few(encoder, x, k)
        if bool(few.settled.all()):
            return few
    rest, outliers = encoder.centre.parts(x)
    cap = max(8 * k, encoder.d_sae // 32)
    # The kernels accumulate and store in float32, so their output is not rounded to bfloat16.
    slope = 2.0**-8 if precision == torch.bfloat16 and not kernels.available(x.device) else 2.0**-22
    reach = _Reach(encoder, rest, outliers, precision, slope)
    if kernels.available(x.device):
        pairs, settled = _kernel_candidates(encoder, rest, outliers, precision, reach, k, cap)
    else:
        approx = approximate(encoder, rest, outliers, precision)
        pairs, settled = _candidates(approx, reach.worst(), slope, k, cap)
        del approx
    crowding = len(pairs.token) / max(1, len(x) * k) if bool(settled.all()) else 1e9
    indices, dots = _decide(encoder, x, _rescored(encoder, rest, outliers, pairs, reach, k), k)
    return Selection(indices, dots if encoder.centre.plain else None, settled, crowding)


def _select_few(encoder: Snapshot, x: torch.Tensor, k: int) -> Selection:
    """As `select`, from all float32 dots: for a few positions, this is faster than steps 1 to 3.

    The best k + `_SPARE` features of a position go to the decision. The position is not settled if
    a feature beyond those might be selected.
    """
    m = min(k + _SPARE, encoder.d_sae)
    dots = all_dots(encoder.rows, x)
    best, feature = (dots + encoder.bias).topk(m, dim=1)
    feature, order = feature.sort(dim=1)
    value = best.gather(1, order).double()
    # The error of the dot, and two roundings of the sum: here, and of the score itself.
    reach = 1.02 * (encoder.d_in + 4) * U * norm_above(x) * encoder.norms_max
    error = (reach + TINY * encoder.d_in * (1 + encoder.norms_max)).double()[:, None]
    error = error + 2.02 * U * value.abs()
    low = kth_largest(value - error, k).clamp_min(0)
    last = (value + error).amin(1)  # no feature beyond these can have a higher score
    settled = value.isfinite().all(1) & ((last < low) | (last <= 0) | (m == encoder.d_sae))
    token = torch.arange(len(x), device=x.device).repeat_interleave(m)
    pairs = Scored(
        token,
        feature.flatten(),
        value.flatten(),
        error.flatten(),
        dots.gather(1, feature).flatten(),
    )
    return Selection(*_decide(encoder, x, pairs, k), settled, m / k)


def clear_scores(
    encoder: Snapshot, x: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scores and features of one or two positions, both `[n, k]`, if float32 decides them all.

    That is so where the k-th score is above the next one, and above zero, by more than the errors.
    Otherwise, and for more positions or other dtypes, the result is None.
    """
    if not 0 < len(x) <= BY_DOTS or encoder.rows.dtype != torch.float32 or x.is_cuda:
        return None
    best, feature = (all_dots(encoder.rows, x) + encoder.bias).topk(
        min(k + 1, encoder.d_sae), dim=1
    )
    size = norm_above(x) * encoder.norms_max + encoder.bias_max
    error = 1.1 * (encoder.d_in + 4) * U * size + TINY * encoder.d_in * (1 + encoder.norms_max)
    last = best[:, k - 1]
    clear = (last > 2 * error) & best.isfinite().all(1)
    if k < encoder.d_sae:
        clear &= last - best[:, k] > 3 * error
    return (best[:, :k], feature[:, :k]) if bool(clear.all()) else None


def approximate(
    encoder: Snapshot, rest: torch.Tensor, outliers: torch.Tensor, precision: torch.dtype
) -> torch.Tensor:
    """The first pass: approximate scores `[n, d_pad]`, with -inf after d_sae."""
    d_sae, centre = encoder.d_sae, encoder.centre
    approx = rest.new_empty((len(rest), -(-d_sae // 16) * 16), dtype=precision)
    approx[:, d_sae:] = float("-inf")
    if precision == torch.bfloat16:
        extra = centre.extra_input(outliers)
        row = torch.cat([rest.to(torch.bfloat16), extra], 1)
        buffer, start = encoder.half_buffer(), 0
        while start < d_sae:
            tile = encoder.half_tile(start, buffer)
            torch.mm(row, tile.T, out=approx[:, start : start + len(tile)])
            start += len(tile)
    else:
        bias = centre.bias.float()
        whole = len(rest) <= BY_DOTS and encoder.rows.dtype == torch.float32
        step = d_sae if whole else 4 * TILE
        for start in range(0, d_sae, step):
            tile = encoder.rows[start : start + step].float()
            out = approx[:, start : start + len(tile)]
            torch.add(product(rest, tile), bias[start : start + step], out=out)
            if outliers.shape[1]:
                out.add_(product(outliers, centre.weights[start : start + step]))
    return approx


class _Reach:
    """The largest error of an approximate score `a`, apart from `slope * |a|`."""

    def __init__(
        self,
        encoder: Snapshot,
        rest: torch.Tensor,
        outliers: torch.Tensor,
        precision: torch.dtype,
        slope: float,
    ) -> None:
        self.encoder, self.slope = encoder, slope
        d_in = encoder.d_in
        self.length = norm_above(rest)
        self.out_length = (
            norm_above(outliers) if outliers.shape[1] else torch.zeros_like(rest[:, 0])
        )
        gather = 2.02 * (d_in + EXTRA) * U
        if precision == torch.bfloat16:
            rounded = norm_above(rest - rest.to(torch.bfloat16).float())
            self.per_error = self.length
            self.per_norm = rounded * 1.01 + self.length * (gather + 3 * U)
            self.out_scale = 2.0**-16 + gather
            self.bias_scale = 2.0**-25 + gather
        else:
            self.per_error = torch.zeros_like(self.length)
            self.per_norm = self.length * (gather + 3 * U)
            self.out_scale = self.bias_scale = 2.0**-19
        # The part that underflow can hide, and the rounding of what is added in float64.
        small, centre = 2.0**-50, encoder.centre
        self.slack = self.out_length * (small * centre.weights_max)
        self.slack += TINY * d_in * (1 + encoder.norms_max) + small * centre.bias_max
        self.slack += small * (d_in + 2) * float(centre.point.norm()) * encoder.norms_max

    def worst(self) -> torch.Tensor:
        """The largest error per position, over all features. `[n]`"""
        encoder, centre = self.encoder, self.encoder.centre
        bound = (
            self.per_error * encoder.half_errors_max
            + self.per_norm * encoder.norms_max
            + self.out_length * (self.out_scale * centre.weights_max)
            + self.bias_scale * centre.bias_max
        )
        # Beyond this size a product might overflow on its way, and no bound holds then.
        size = self.length * encoder.norms_max + self.out_length * centre.weights_max
        overflows = ~(size + centre.bias_max < 2.0**126)
        return (bound * 1.0001 + self.slack).masked_fill_(overflows, float("inf"))

    def of(self, pairs: Pairs) -> torch.Tensor:
        """The largest error of single pairs, from the norms of their own rows. `[p]`"""
        encoder, centre = self.encoder, self.encoder.centre
        t, i = pairs.token, pairs.feature
        bound = self.per_error[t] * encoder.half_errors[i] + self.per_norm[t] * encoder.norms[i]
        bound += self.out_length[t] * (self.out_scale * centre.weights_max)
        bound += self.bias_scale * centre.bias_max
        return bound * 1.0001 + self.slack[t] + self.slope * pairs.approx.abs()


def _candidates(
    approx: torch.Tensor, bound: torch.Tensor, slope: float, k: int, cap: int
) -> tuple[Pairs, torch.Tensor]:
    """Every pair that may be in the top k, and per position whether there are at most `cap`."""
    n, width = approx.shape
    # Floats that are not negative are in the order of their bits, and whole numbers compare faster.
    bits = approx.view(torch.int16 if approx.dtype == torch.bfloat16 else torch.int32)
    kth = _kth_of_groups(bits, k).view(approx.dtype).float()
    kth.masked_fill_(kth.signbit(), float("-inf"))
    line = kth - slope * kth.abs() - 2 * bound
    line = line - 2 * slope * line.abs()
    floor = -bound * (1 + 4 * slope)
    # At least `line`, and more than `floor`. Rounded to the dtype of `approx`, it divides its
    # numbers as before, but for one that may be just below.
    least = torch.maximum(line, floor.nextafter(floor.new_full((), float("inf"))))
    settled = bound.isfinite() & (kth < float("inf"))
    rounded = least.to(approx.dtype)[:, None]
    low = rounded.signbit().squeeze(1)
    found = [settled.new_zeros(0, dtype=torch.long)]
    step = max(1, n) if approx.is_cuda else max(1, _AT_ONCE // width)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        hit = at_least(bits[rows], rounded[rows].view(bits.dtype))
        if bool(low[rows].any()):
            hit[low[rows]] = approx[rows][low[rows]] >= rounded[rows][low[rows]]
        if not bool(settled[rows].all()):
            hit &= settled[rows, None]
        place = places(hit)
        counts = torch.bincount(place // width, minlength=len(hit))
        over = counts > cap
        if bool(over.any()):
            settled[rows] &= ~over
            place = place[~over[place // width]]
        found.append(place + start * width)
    at = torch.cat(found)
    token = at // width
    pairs = Pairs(token, at - token * width, approx.view(-1).index_select(0, at).float())
    return pairs, settled


def _kth_of_groups(bits: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of the maxima of disjoint groups of each row, all as bits. `[n, w] -> [n]`

    Whole numbers have the order of the floats only where those are not negative. So a result that
    is negative says no more than that fewer than k groups hold a number that is not.
    """
    n, width = bits.shape
    size = (
        1  # any disjoint groups do; with fewer of them the k-th is found sooner, and hardly lower
    )
    while width % (2 * size) == 0 and width // (2 * size) >= 8 * k:
        size *= 2
    return kth_largest(bits.view(n, size, width // size).amax(1), k)


def _kernel_candidates(
    encoder: Snapshot,
    rest: torch.Tensor,
    outliers: torch.Tensor,
    precision: torch.dtype,
    reach: _Reach,
    k: int,
    cap: int,
) -> tuple[Pairs, torch.Tensor]:
    """As `_candidates`, but without a tensor `[n, d_sae]`.

    The line comes from the top k of a sixteenth of the features, and the kernel keeps the features
    that reach it.
    """
    centre, cap = encoder.centre, max(cap, 32 * k)  # about 16 k reach a line from a sixteenth
    some = min(encoder.d_sae, max(k, encoder.d_sae // 16))
    bound = reach.worst()
    # This product is in full float32, and its error is within the same bound.
    sample = product(rest, encoder.rows[:some].float()) + product(outliers, centre.weights[:some])
    kth = (sample + centre.bias[:some].float()).topk(k, dim=1).values[:, -1]
    line = torch.maximum(kth - 2 * reach.slope * kth.abs() - 2.01 * bound, -1.01 * bound)
    count, feature, approx = kernels.candidates(
        rest,
        encoder.rows,
        centre.bias.float(),
        outliers,
        centre.weights,
        line,
        cap,
        precision == torch.bfloat16,
    )
    settled = bound.isfinite() & kth.isfinite() & (count <= cap)
    feature, order = feature.sort(dim=1)  # the kernel found them in any order
    token, slot = ((feature >= 0) & settled[:, None]).nonzero(as_tuple=True)
    return Pairs(token, feature[token, slot].long(), approx.gather(1, order)[token, slot]), settled


def _rescored(
    encoder: Snapshot,
    rest: torch.Tensor,
    outliers: torch.Tensor,
    pairs: Pairs,
    reach: _Reach,
    k: int,
) -> Scored:
    """Step 3 of the module's docstring: the candidates that may still be selected, scored again."""

    def score(part: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dot = pair_dots(encoder.rows, rest, part.token, part.feature)
        # Bias and outliers are added in float64.
        value = dot.double() + encoder.centre.bias[part.feature]
        if outliers.shape[1]:
            weights = encoder.centre.weights[part.feature].double()
            value += (outliers[part.token].double() * weights).sum(-1)
        error = (1.02 * (encoder.d_in + 4) * U) * reach.length[part.token]
        error = (error * encoder.norms[part.feature]).double() + reach.slack[part.token]
        # The score itself is rounded to float32 once more.
        return value, error + 1.01 * U * value.abs(), dot

    wanted = len(rest) * k
    at_once = _READS_ALL * wanted > encoder.d_sae and len(pairs.token) < _SOME_MORE * wanted
    if at_once or len(pairs.token) <= _HARDLY_MORE * wanted:
        return Scored(pairs.token, pairs.feature, *score(pairs))
    grid = Grid(pairs.token, len(rest))
    chosen = pairs.approx >= kth_largest(grid.table(pairs.approx), k)[pairs.token]
    first, others = places(chosen), places(~chosen)
    best = score(pairs.take(first))
    lows = best[0].new_full((len(chosen),), float("-inf"))
    lows[first] = best[0] - best[1]
    line = kth_largest(grid.table(lows), k).float()
    open_ = pairs.take(others)
    second = others[open_.approx + reach.of(open_) >= line[open_.token]]
    more = score(pairs.take(second))
    which, order = torch.cat([first, second]).sort()
    found = pairs.take(which)
    columns = (torch.cat(both)[order] for both in zip(best, more, strict=True))
    return Scored(found.token, found.feature, *columns)


def _decide(
    encoder: Snapshot, x: torch.Tensor, pairs: Scored, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4 of the module's docstring: indices `[n, k]`, -1 for none, and their dots `[n, k]`."""
    n, token, feature = len(x), pairs.token, pairs.feature
    value, error = pairs.value, pairs.error
    grid = Grid(token, n)
    # At least k scores reach `low`, and fewer than k exceed `high`. So a feature is contested only
    # if its possible scores meet the span between these two, or zero.
    low = kth_largest(grid.table(value - error), k).clamp_min(0)[token]
    high = kth_largest(grid.table(value + error), k).clamp_min(0)[token]
    sure = value - error > high
    contested = ~sure & (value + error >= low) & (value + error > 0)
    score = torch.full_like(value, float("-inf")).masked_fill(sure, float("inf"))
    # If all contested features of a position fit into its k, the positive ones need no decision.
    room = k - torch.bincount(token[sure], minlength=n)
    fits = torch.bincount(token[contested], minlength=n) <= room
    clear = contested & fits[token] & (value - error > 0)
    score[clear] = 1
    open_ = places(contested & ~clear)
    exact = exact_scores(encoder.rows, encoder.bias, x, token[open_], feature[open_])
    score[open_] = torch.where(exact > 0, exact, float("-inf"))

    # Features ascend within a position, so the first ones of those with the k-th score are taken.
    last = kth_largest(grid.table(score), k)[token]
    above, level = score > last, (score == last) & (score > float("-inf"))
    room = k - torch.bincount(token[above], minlength=n)
    before = level.cumsum(0) - level.long()
    before -= before[grid.start[token]]
    taken = places(above | (level & (before < room[token])))
    token = token[taken]
    slot = token * k + Grid(token, n).rank
    indices = torch.full((n, k), -1, dtype=torch.long, device=x.device)
    indices.view(-1)[slot] = feature[taken]
    dots = x.new_zeros((n, k))
    dots.view(-1)[slot] = pairs.dot[taken]
    return indices, dots
