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
4. *Decision.* The new scores have a float32 error bound of their own. The features that it leaves
   contested around the k-th place are scored once more in parts, with a smaller error, and the few
   that are still contested are decided by exact sums.

A position with too many candidates is not settled here. The caller repeats it with a tighter first
pass, and in the end with `exact_topk`.

The bound of a bfloat16 first pass, with `x = c + r + o` as in `Centre`, hats for rounded tensors
and measured norms, is a sum of `|r| |w - w^| + |r - r^| |w^|` (Cauchy and Schwarz), `2 K u` times
the sums of magnitudes (accumulation of K terms in any order, chopped or rounded; u = 2^-24),
`2^-16 |o| |w_o|` (products of the split outliers that are left out), `2^-8 |a|` (for an output in
bfloat16), and what underflow can hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_scope_lens.saes.exact.dots import exact_scores, pair_dots, part_dots
from qwen_scope_lens.saes.exact.encoder import EXTRA, TILE, Snapshot, norm_above
from qwen_scope_lens.saes.exact.matmul import BY_DOTS, full_sums, product
from qwen_scope_lens.saes.exact.pairs import (
    Grid,
    Pairs,
    Scored,
    at_least,
    kth_largest,
    on_cpu,
    pick,
    places,
)

__all__ = [
    "BLOCK_BYTES",
    "Selection",
    "approximate",
    "are_few",
    "clear_scores",
    "select",
    "select_few",
    "tokens_per_block",
]

U = 2.0**-24
TINY = 2.0**-120
BLOCK_BYTES = 64 * 2**20
"""The size of the first pass over one block of positions. Its other tensors are smaller."""

BLOCK_BYTES_ON_GPU = 512 * 2**20
"""The same on a GPU, where each block costs many launches, up to an eighth of the free memory."""

_PARTS = 16
"""In how many parts the dots of contested features are summed: see `_Block.scores`."""

Finer = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""`_Block.scores`, or a function like it."""

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


def tokens_per_block(encoder: Snapshot, precision: torch.dtype) -> int:
    """The number of positions of one first pass, so that it fits into BLOCK_BYTES."""
    size, most = BLOCK_BYTES, 2048
    if encoder.rows.is_cuda:
        size, most = min(BLOCK_BYTES_ON_GPU, torch.cuda.mem_get_info()[0] // 8), 2**14
    return max(1, min(most, size // (encoder.d_sae * precision.itemsize)))


def select(encoder: Snapshot, x: torch.Tensor, k: int, precision: torch.dtype) -> Selection:
    """The k best features of each position, as far as the first pass can tell. `x [n, d_in]`"""
    block = _Block(encoder, x, precision)
    approx = approximate(encoder, block.rest, block.outliers, precision)
    cap = max(8 * k, encoder.d_sae // 32)
    pairs, settled = _candidates(approx, block.worst(), block.slope, k, cap)
    del approx
    crowding = len(pairs.token) / max(1, len(x) * k) if bool(settled.all()) else 1e9
    indices, dots = _decide(encoder, x, _rescored(block, pairs, k), k, block.scores)
    return Selection(indices, dots if encoder.centre.plain else None, settled, crowding)


def are_few(encoder: Snapshot, x: torch.Tensor, precision: torch.dtype) -> bool:
    """Whether `all_dots` replaces steps 1 to 3: for one or two positions that is faster."""
    full = precision == encoder.rows.dtype == torch.float32
    return full and 0 < len(x) <= BY_DOTS and on_cpu(x)


def clear_scores(
    encoder: Snapshot, x: torch.Tensor, dots: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scores and features of a few positions, both `[n, k]`, if float32 decides them all.

    That is so where the k-th score is above the next one, and above zero, by more than the errors.
    """
    best, feature = (dots + encoder.bias).topk(min(k + 1, encoder.d_sae), dim=1)
    size = float(norm_above(x).max()) * encoder.norms_max + encoder.bias_max
    error = 1.1 * (encoder.d_in + 4) * U * size + TINY * encoder.d_in * (1 + encoder.norms_max)
    for scores in best.tolist():  # a comparison with NaN is false
        last, after = scores[k - 1], scores[k] if k < len(scores) else -math.inf
        if not (2 * error < last and last - after > 3 * error and scores[0] < math.inf):
            return None
    return best[:, :k], feature[:, :k]


def select_few(encoder: Snapshot, x: torch.Tensor, dots: torch.Tensor, k: int) -> Selection:
    """As `select`, from all float32 dots of a few positions. `x [n, d_in]`, `dots [n, d_sae]`

    The best k + `_SPARE` features of a position go to the decision. The position is not settled if
    a feature beyond those might be selected.
    """
    m = min(k + _SPARE, encoder.d_sae)
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
        with full_sums:
            while start < d_sae:
                tile = encoder.half_tile(start, buffer)
                torch.mm(row, tile[:, : row.shape[1]].T, out=approx[:, start : start + len(tile)])
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


class _Block:
    """A block of positions in one first pass, and how far its scores may be from the exact ones."""

    def __init__(self, encoder: Snapshot, x: torch.Tensor, precision: torch.dtype) -> None:
        self.encoder = encoder
        self.rest, self.outliers = encoder.centre.parts(x)
        self.slope = 2.0**-8 if precision == torch.bfloat16 else 2.0**-22
        """An approximate score `a` is wrong by at most `slope * |a|` and what `worst` says."""
        rest, outliers = self.rest, self.outliers
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
        """The largest error per position, over all features, without `slope`. `[n]`"""
        encoder, centre = self.encoder, self.encoder.centre
        bound = (
            self.per_error * encoder.half_errors_max
            + self.per_norm * encoder.norms_max
            + self.out_length * (self.out_scale * centre.weights_max)
            + self.bias_scale * centre.bias_max
        )
        # Where a product could overflow on its way, so did the square of a length: it is infinite.
        return bound * 1.0001 + self.slack

    def of(self, pairs: Pairs) -> torch.Tensor:
        """The largest error of single pairs, from the norms of their own rows. `[p]`"""
        encoder, centre = self.encoder, self.encoder.centre
        t, i = pairs.token, pairs.feature
        bound = pick(self.per_error, t) * pick(encoder.half_errors, i)
        bound += pick(self.per_norm, t) * pick(encoder.norms, i)
        bound += pick(self.out_length, t) * (self.out_scale * centre.weights_max)
        bound += self.bias_scale * centre.bias_max
        return bound * 1.0001 + pick(self.slack, t) + self.slope * pairs.approx.abs()

    def scores(
        self, token: torch.Tensor, feature: torch.Tensor, parts: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The float32 scores of pairs, their largest errors, and the float32 dots. All `[p]`.

        A dot in several parts, each summed in float32 and all of them in float64, has an error
        that is smaller by that factor.
        """
        encoder, rest = self.encoder, self.rest
        if parts == 1:
            dot = pair_dots(encoder.rows, rest, token, feature)
            value = dot.double()
        else:
            dot = part_dots(encoder.rows, rest, token, feature, parts)
            value = dot.double().sum(1)
        # Bias and outliers are added in float64.
        value += pick(encoder.centre.bias, feature)
        if self.outliers.shape[1]:
            weights = pick(encoder.centre.weights, feature).double()
            value += (pick(self.outliers, token).double() * weights).sum(-1)
        error = (1.02 * (encoder.d_in // parts + 4) * U) * pick(self.length, token)
        error = (error * pick(encoder.norms, feature)).double() + pick(self.slack, token)
        # The score itself is rounded to float32 once more.
        return value, error + 1.01 * U * value.abs(), dot


def _candidates(
    approx: torch.Tensor, bound: torch.Tensor, slope: float, k: int, cap: int
) -> tuple[Pairs, torch.Tensor]:
    """Every pair that may be in the top k, and per position whether there are at most `cap`."""
    n, width = approx.shape
    # Floats that are not negative are in the order of their bits, and whole numbers compare faster.
    bits = approx.view(torch.int16 if approx.dtype == torch.bfloat16 else torch.int32)
    kth = _kth_of_groups(bits, k).view(approx.dtype).float()
    line = kth - slope * kth.abs() - 2 * bound
    line = line - 2 * slope * line.abs()
    floor = -bound * (1 + 4 * slope)
    # At least `line`, and more than `floor`, which is above the line if `kth` is negative. Rounded
    # to the dtype of `approx`, it divides its numbers as before, but for one just below.
    least = torch.maximum(line, floor.nextafter(floor.new_full((), float("inf"))))
    settled = bound.isfinite() & (kth < float("inf"))
    rounded = least.to(approx.dtype)[:, None]
    low = rounded.signbit().squeeze(1)
    found = [settled.new_zeros(0, dtype=torch.long)]
    step = max(1, _AT_ONCE // width if on_cpu(approx) else n)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        hit = at_least(bits[rows], rounded[rows].view(bits.dtype))
        if bool(low[rows].any()):
            hit[low[rows]] = approx[rows][low[rows]] >= rounded[rows][low[rows]]
        place = places(hit)
        settled[rows] &= torch.bincount(place // width, minlength=len(hit)) <= cap
        if not bool(settled[rows].all()):
            place = place[settled[rows][place // width]]
        found.append(place + start * width)
    at = torch.cat(found)
    token = at // width
    pairs = Pairs(token, at - token * width, pick(approx.view(-1), at).float())
    return pairs, settled


def _kth_of_groups(bits: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of the maxima of disjoint groups of each row, all as bits. `[n, w] -> [n]`

    Whole numbers have the order of the floats only where those are not negative. So a result that
    is negative need not be the k-th, but then fewer than k groups hold a number above zero.
    """
    n, width = bits.shape
    size = 1  # Of larger groups the k-th is found sooner, and of 8 k it is hardly lower.
    while width % (2 * size) == 0 and width // (2 * size) >= 8 * k:
        size *= 2
    return kth_largest(bits.view(n, size, width // size).amax(1), k)


def _rescored(block: _Block, pairs: Pairs, k: int) -> Scored:
    """Step 3 of the module's docstring: the candidates that may still be selected, scored again."""
    n = len(block.rest)
    at_once = _READS_ALL * n * k > block.encoder.d_sae and len(pairs.token) < _SOME_MORE * n * k
    if (at_once and on_cpu(pairs.token)) or len(pairs.token) <= _HARDLY_MORE * n * k:
        return Scored(pairs.token, pairs.feature, *block.scores(pairs.token, pairs.feature))
    grid = Grid(pairs.token, n)
    chosen = pairs.approx >= pick(kth_largest(grid.table(pairs.approx), k), pairs.token)
    first, others = places(chosen), places(~chosen)
    best = block.scores(pick(pairs.token, first), pick(pairs.feature, first))
    lows = best[0].new_full((len(chosen),), float("-inf"))
    lows.scatter_(0, first, best[0] - best[1])
    line = kth_largest(grid.table(lows), k).float()
    open_ = pairs.take(others)
    second = others[open_.approx + block.of(open_) >= pick(line, open_.token)]
    more = block.scores(pick(pairs.token, second), pick(pairs.feature, second))
    which, order = torch.cat([first, second]).sort()
    found = pairs.take(which)
    columns = (pick(torch.cat(both), order) for both in zip(best, more, strict=True))
    return Scored(found.token, found.feature, *columns)


def _decide(
    encoder: Snapshot, x: torch.Tensor, pairs: Scored, k: int, finer: Finer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4 of the module's docstring: indices `[n, k]`, -1 for none, and their dots `[n, k]`."""
    n = len(x)
    pairs, contested = _contested(pairs, n, k)
    if finer is not None and encoder.d_in % _PARTS == 0 and bool(contested.any()):
        again = places(contested)
        value, error, _ = finer(pick(pairs.token, again), pick(pairs.feature, again), _PARTS)
        pairs.value[again], pairs.error[again] = value, error
        pairs, contested = _contested(pairs, n, k)
    token, feature = pairs.token, pairs.feature
    score = torch.full_like(pairs.value, float("inf")).masked_fill_(contested, float("-inf"))
    # If all contested features of a position fit into its k, the positive ones need no decision.
    room = k - torch.bincount(token[~contested], minlength=n)
    fits = torch.bincount(token[contested], minlength=n) <= room
    clear = contested & pick(fits, token) & (pairs.value - pairs.error > 0)
    score[clear] = 1
    open_ = places(contested & ~clear)
    exact = exact_scores(encoder.rows, encoder.bias, x, pick(token, open_), pick(feature, open_))
    score[open_] = torch.where(exact > 0, exact, float("-inf"))

    # Features ascend within a position, so the first ones of those with the k-th score are taken.
    grid = Grid(token, n)
    last = pick(kth_largest(grid.table(score), k), token)
    above, level = score > last, (score == last) & (score > float("-inf"))
    room = k - torch.bincount(token[above], minlength=n)
    before = level.cumsum(0) - level.long()
    before -= pick(before, pick(grid.start, token))
    taken = places(above | (level & (before < pick(room, token))))
    token = pick(token, taken)
    slot = token * k + Grid(token, n).rank
    indices = torch.full((n, k), -1, dtype=torch.long, device=x.device)
    indices.view(-1).scatter_(0, slot, pick(feature, taken))
    dots = x.new_zeros((n, k))
    dots.view(-1).scatter_(0, slot, pick(pairs.dot, taken))
    return indices, dots


def _contested(pairs: Scored, n: int, k: int) -> tuple[Scored, torch.Tensor]:
    """The pairs that may be selected, and which of these it is not certain of.

    At least k scores of a position reach `low`, and fewer than k exceed `high`. So a feature is out
    if it cannot reach `low` or be positive, and it is in if it must exceed `high`.
    """
    low = kth_largest(Grid(pairs.token, n).table(pairs.value - pairs.error), k).clamp_min(0)
    most = pairs.value + pairs.error
    pairs = pairs.take(places((most >= pick(low, pairs.token)) & (most > 0)))
    most = Grid(pairs.token, n).table(pairs.value + pairs.error)
    high = kth_largest(most, k).clamp_min(0)
    return pairs, pairs.value - pairs.error <= pick(high, pairs.token)
