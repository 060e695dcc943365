"""Encoder: the tensors that the certified top-k computes from an encoder's weights.

These are row norms and rounding errors for the bounds, a centre that makes the bounds tight on real
residuals, and, on request, a bfloat16 copy of the rows. `certified.py` uses them to certify a
selection.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from qwen_scope_lens.saes.exact.pairs import on_cpu

__all__ = ["EXTRA", "Centre", "Encoder", "Snapshot", "norm_above", "split"]

EXTRA = 32
"""The number of columns after d_in in a bfloat16 tile: the bias in three parts, and the outlier
columns in three parts."""

OUTLIERS = 8
"""The largest number of outlier columns."""

TILE = 1024
"""How many rows of the encoder are converted or measured at a time."""


def norm_above(matrix: torch.Tensor) -> torch.Tensor:
    """An upper bound of each row's length, for any order of summation. `[n, d] -> [n]`"""
    return matrix.float().norm(dim=-1) * (1 + matrix.shape[-1] * 2.0**-23) + 1e-18


def split(x: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """bfloat16 tensors whose sum is `x`. Each part lowers the error by a factor of 2^-9."""
    found = []
    rest = x.double()
    for _ in range(parts):
        found.append(rest.to(torch.bfloat16))
        rest = rest - found[-1].double()
    return found


@dataclass
class Centre:
    """A point near the residuals, and the columns with outliers. Both are left out of the product
    whose rounding is bounded.

    `x = c + rest + outliers`, so `W x + b = W rest + W_O x_O + (W c + b)`. Only `W rest` is rounded
    coarsely, and `rest` is short, so its bound is tight. Results are exact for any centre, but a
    good centre certifies more tokens.
    """

    point: torch.Tensor
    """The point c: float32 `[d_in]`, zero at the outlier columns. All zeros mean no centring."""
    columns: torch.Tensor
    """The numbers of the outlier columns, `[m]` with m <= 8."""
    bias: torch.Tensor
    """`W c + b`, float64 `[d_sae]`."""
    weights: torch.Tensor
    """`W[:, columns]`, float32 `[d_sae, m]`."""
    extra: torch.Tensor = field(init=False)
    """The columns of a bfloat16 tile for bias and outliers. `[d_sae, EXTRA]`"""

    def __post_init__(self) -> None:
        m = len(self.columns)
        self.extra = torch.zeros(
            (len(self.bias), EXTRA), dtype=torch.bfloat16, device=self.bias.device
        )
        high, low = split(self.weights, 2)
        parts = [*(b[:, None] for b in split(self.bias, 3)), high, high, low]
        self.extra[:, : 3 + 3 * m] = torch.cat(parts, 1)
        self.bias_max = float(self.bias.abs().max()) if len(self.bias) else 0.0
        self.weights_max = float(norm_above(self.weights).max()) if m else 0.0

    @property
    def plain(self) -> bool:
        """Whether there is neither a centre nor an outlier column."""
        return not len(self.columns) and not bool(self.point.any())

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split float32 residuals `[n, d_in]` into the rest `[n, d_in]` and outliers `[n, m]`."""
        if self.plain:
            return x, x[:, :0]
        rest = x - self.point
        rest[:, self.columns] = 0
        return rest, x[:, self.columns]

    def extra_input(self, outliers: torch.Tensor) -> torch.Tensor:
        """The input for the columns of `extra` in use. `[n, m] -> bfloat16 [n, at most EXTRA]`"""
        n, m = outliers.shape
        high, low = split(outliers, 2)
        out = high.new_zeros((n, -(-(3 + 3 * m) // 4) * 4))
        out[:, :3] = 1
        out[:, 3 : 3 + 3 * m] = torch.cat([high, low, high], 1)
        return out


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to encode one block of positions: weights, their bounds and a centre.

    It is never changed, so a thread can go on with its snapshot while another thread finds a better
    centre.
    """

    rows: torch.Tensor
    """The encoder rows as stored, `[d_sae, d_in]`."""
    bias: torch.Tensor
    """The encoder bias as stored, `[d_sae]`."""
    norms: torch.Tensor
    """Upper bounds of the lengths of the rows, float32 `[d_sae]`."""
    half_errors: torch.Tensor
    """Upper bounds of the lengths of the rows' rounding errors in bfloat16, float32 `[d_sae]`."""
    norms_max: float
    half_errors_max: float
    bias_max: float
    centre: Centre
    half: torch.Tensor | None
    """The rows in bfloat16 with the centre's extra columns, if such a copy is kept."""

    @property
    def d_sae(self) -> int:
        return self.rows.shape[0]

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    def half_buffer(self) -> torch.Tensor:
        """A buffer for the rows that `half_tile` converts. On one core it stays in the cache."""
        if self.half is not None:
            rows = 0
        elif on_cpu(self.rows):
            rows = TILE // 2 if torch.get_num_threads() == 1 else 2 * TILE
        else:
            rows = 16 * TILE
        shape = (min(rows, self.d_sae), self.d_in + EXTRA)
        return self.rows.new_empty(shape, dtype=torch.bfloat16)

    def half_tile(self, start: int, buffer: torch.Tensor) -> torch.Tensor:
        """Rows from `start` in bfloat16 with their extra columns. `[<= 16 TILE, d_in + EXTRA]`"""
        if self.half is not None:
            return self.half[start : start + 16 * TILE]
        stop = min(start + len(buffer), self.d_sae)
        tile = buffer[: stop - start]
        tile[:, : self.d_in].copy_(self.rows[start:stop])
        tile[:, self.d_in :].copy_(self.centre.extra[start:stop])
        return tile

    def centred(self, point: torch.Tensor, columns: list[int]) -> Snapshot:
        """A snapshot with this centre and these outlier columns. A kept bfloat16 copy is copied."""
        centre = _centre_at(self.rows, self.bias, point, columns)
        half = self.half
        if half is not None:
            half = half.clone()
            half[:, self.d_in :] = centre.extra
        return replace(self, centre=centre, half=half)


class Encoder:
    """`rows [d_sae, d_in]` and `bias [d_sae]` as stored, with the tensors derived from them.

    Threads may share an encoder: each block takes `snapshot` once, and recentring puts a new
    snapshot in its place.
    """

    def __init__(self, rows: torch.Tensor, bias: torch.Tensor, keep_half: bool = False) -> None:
        self.settled: Counter[str] = Counter()
        """How many positions each precision settled, for information. Threads that count at the
        same time may lose some."""
        self.crowding = 0.0
        """Candidates divided by k in the last first pass. It shows how tight the bound was."""
        norms, errors = [], []
        for tile in rows.split(TILE):
            norms.append(norm_above(tile))
            errors.append(norm_above(tile.float() - tile.to(torch.bfloat16).float()))
        empty = rows.new_zeros(0, dtype=torch.float32)
        lengths, half_errors = torch.cat([empty, *norms]), torch.cat([empty, *errors])
        if rows.dtype == torch.bfloat16:
            half_errors.zero_()
        centre = _centre_at(rows, bias, torch.zeros_like(rows[0], dtype=torch.float32), [])
        half = None
        if keep_half:
            d_in = rows.shape[1]
            half = rows.new_empty((len(rows), d_in + EXTRA), dtype=torch.bfloat16)
            half[:, :d_in] = rows
            half[:, d_in:] = centre.extra
        self.snapshot = Snapshot(
            rows=rows,
            bias=bias,
            norms=lengths,
            half_errors=half_errors,
            norms_max=float(lengths.max()),
            half_errors_max=float(half_errors.max()),
            bias_max=float(bias.float().abs().max()),
            centre=centre,
            half=half,
        )
        self.turn = threading.Lock()
        self.blocks_until_recentre = 0
        self._recentred = 0

    @property
    def rows(self) -> torch.Tensor:
        return self.snapshot.rows

    @property
    def bias(self) -> torch.Tensor:
        return self.snapshot.bias

    @property
    def d_sae(self) -> int:
        return self.snapshot.d_sae

    @property
    def centre(self) -> Centre:
        """The centre with which the next block will be encoded."""
        return self.snapshot.centre

    @property
    def keeps_half(self) -> bool:
        """Whether a bfloat16 copy is kept, so that a bfloat16 pass converts nothing."""
        return self.snapshot.half is not None

    def recentre(self, x: torch.Tensor) -> bool:
        """Choose the centre and the outlier columns from residuals, float32 `[n, d_in]`.

        Returns True if there is a new centre. Weights in bfloat16 are not rounded and need none.
        Each change reads all the weights, so it is allowed ever more rarely, and in one thread at a
        time: meanwhile the other threads go on as they are.
        """
        if not self.turn.acquire(blocking=False):
            return False
        try:
            self.blocks_until_recentre -= 1
            half = self.rows.dtype == torch.bfloat16
            if self.blocks_until_recentre > 0 or len(x) < 32 or half:
                return False
            self._recentred += 1
            self.blocks_until_recentre = 4**self._recentred
            sample = x[:: max(1, len(x) // 512)]
            point = sample.median(dim=0).values
            apart = (sample - point).square()
            share = (apart / apart.sum(-1, keepdim=True).clamp_min(1e-30)).mean(0)
            best = share.topk(min(OUTLIERS, x.shape[1]))
            columns = best.indices[best.values > 16 / x.shape[1]].sort().values.tolist()
            self.snapshot = self.snapshot.centred(point, columns)
            return True
        finally:
            self.turn.release()


def _centre_at(
    rows: torch.Tensor, bias: torch.Tensor, point: torch.Tensor, columns: list[int]
) -> Centre:
    point = point.clone()
    point[columns] = 0
    shifted = bias.double()
    if bool(point.any()):
        exact = point.double()
        shift = [tile.double() @ exact for tile in rows.split(TILE)]
        shifted = shifted + torch.cat(shift)
    where = torch.tensor(columns, dtype=torch.long, device=rows.device)
    return Centre(point, where, shifted, rows[:, where].float())
