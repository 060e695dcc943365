"""Sparse codes in four or five bytes per entry, as a store keeps them.

Values are float16, rounded to nearest. The few values that are too large for float16 (on Qwen's
sink tokens) are in a separate list, rounded to the same eleven bits but with the range of float32.
Indices are uint16, with one more byte where an SAE has more than 65,536 features. `shard_files.py`
writes the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_scope_lens.errors import StoreDamaged

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from qwen_scope_lens.saes.codes import SparseCodes

__all__ = ["OVERFLOW", "REPAIR", "Packed", "as_codes", "as_matrix", "pack", "stored_values"]

REPAIR = "`qsl store check` finds all damage, and running the same `qsl extract` again repairs it"

OVERFLOW = np.dtype([("at", "<i8"), ("value", "<f4")])
"""An entry that float16 cannot hold: its place in the flattened `[n, k]`, and its value."""

_NARROW = 1 << 16
_LEAST = np.float16(6e-8)  # the least positive float16


@dataclass(frozen=True)
class Packed:
    """`[n, k]` entries. Where `values` is infinite, `overflow` has the value."""

    low: np.ndarray  # uint16 [n, k]
    high: np.ndarray | None  # uint8 [n, k]: index >> 16
    values: np.ndarray  # float16 [n, k]
    overflow: np.ndarray  # OVERFLOW [m], ascending in `at`
    d_sae: int

    def __len__(self) -> int:
        return len(self.low)

    @property
    def k(self) -> int:
        return int(self.low.shape[1])

    def rows(self, start: int, end: int) -> Packed:
        """A slice of the positions (views)."""
        first, last = np.searchsorted(self.overflow["at"], [start * self.k, end * self.k])
        overflow = self.overflow[first:last].copy()
        overflow["at"] -= start * self.k
        high = None if self.high is None else self.high[start:end]
        return Packed(self.low[start:end], high, self.values[start:end], overflow, self.d_sae)

    def take(self, rows: np.ndarray) -> Packed:
        """Some positions, in the order given."""
        values = self.values[rows]
        at = []
        for row in np.unique(np.nonzero(np.isinf(values))[0]):  # rare
            [column] = np.nonzero(np.isinf(values[row]))
            wanted = rows[row] * self.k + column
            if not np.isin(wanted, self.overflow["at"]).all():
                raise StoreDamaged(f"an activation beyond float16 has no value. {REPAIR}")
            place = np.searchsorted(self.overflow["at"], wanted)
            at += list(zip(row * self.k + column, self.overflow["value"][place], strict=True))
        overflow = np.array([(int(a), float(v)) for a, v in at], dtype=OVERFLOW)
        high = None if self.high is None else self.high[rows]
        return Packed(self.low[rows], high, values, overflow, self.d_sae)

    @staticmethod
    def empty(k: int, d_sae: int) -> Packed:
        values = np.zeros((0, k), np.float16)
        return Packed(values.astype(np.uint16), None, values, np.zeros(0, OVERFLOW), d_sae)

    @staticmethod
    def cat(parts: Sequence[Packed]) -> Packed:
        starts = np.cumsum([0, *(part.low.size for part in parts)])
        overflow = np.concatenate([part.overflow for part in parts])
        lengths = [len(part.overflow) for part in parts]
        overflow["at"] += np.repeat(starts[:-1], lengths)
        highs = [part.high for part in parts if part.high is not None]
        return Packed(
            np.concatenate([part.low for part in parts]),
            np.concatenate(highs) if highs else None,
            np.concatenate([part.values for part in parts]),
            overflow,
            parts[0].d_sae,
        )

    def indices(self) -> np.ndarray:
        """int32 `[n, k]`, all below d_sae.

        A file with a larger index raises here, because compiled code that trusted it would write
        outside its memory.
        """
        indices = self.low.astype(np.int32)
        if self.high is not None:
            indices |= self.high.astype(np.int32) << 16
        if indices.size and (most := int(indices.max())) >= self.d_sae:
            raise StoreDamaged(
                f"feature {most} is in a file of codes, but the SAE has 0..{self.d_sae - 1}."
                f" {REPAIR}"
            )
        return indices

    def numbers(self) -> np.ndarray:
        """float32 `[n, k]`, exactly as stored: finite and not negative."""
        values = self.values.astype(np.float32)
        if len(self.overflow):
            values.reshape(-1)[self.overflow["at"]] = self.overflow["value"]
        if not ((values >= 0) & (values < np.inf)).all():
            raise StoreDamaged(
                f"an activation in a file of codes is negative or not finite. {REPAIR}"
            )
        return values

    def matrix(self) -> csr_matrix:
        """A row per position, a column per feature, no padding."""
        return as_matrix(self.numbers(), self.indices(), self.d_sae)

    def unpack(self) -> SparseCodes:
        return as_codes(self.numbers(), self.indices(), self.d_sae)


def as_matrix(values: np.ndarray, indices: np.ndarray, d_sae: int) -> csr_matrix:
    """What `SparseCodes.to_scipy_csr` makes, of arrays `[n, k]` and without torch."""
    from scipy.sparse import csr_matrix

    active = values > 0
    starts = np.concatenate([[0], np.cumsum(active.sum(1))])
    matrix = csr_matrix((values[active], indices[active], starts), shape=(len(values), d_sae))
    matrix.sort_indices()
    return matrix


def as_codes(values: np.ndarray, indices: np.ndarray, d_sae: int) -> SparseCodes:
    """SparseCodes of arrays `[n, k]`, which share their memory. Only this needs torch."""
    import torch

    from qwen_scope_lens.saes.codes import SparseCodes

    return SparseCodes(torch.from_numpy(values), torch.from_numpy(indices), d_sae)


def pack(codes: SparseCodes) -> Packed:
    """Round `SparseCodes [n, k]` to what a store keeps, and order the entries again."""
    codes = codes.detach().to("cpu")
    values = codes.values.float().numpy()
    indices = codes.indices.numpy()
    stored = stored_values(values)
    # Rounding makes ties, and ties are in order of the index: sort by descending value, then index.
    key = (~stored.view(np.uint32)).astype(np.int64) << 20 | indices
    key = np.where(stored > 0, key, np.iinfo(np.int64).max)
    order = np.argsort(key, axis=-1, kind="stable")
    stored = np.take_along_axis(stored, order, -1)
    indices = np.take_along_axis(indices, order, -1)
    indices = np.where(stored > 0, indices, 0)
    with np.errstate(over="ignore"):
        half = stored.astype(np.float16)
    [at] = np.nonzero(np.isinf(half.reshape(-1)))
    overflow = np.zeros(len(at), dtype=OVERFLOW)
    overflow["at"], overflow["value"] = at, stored.reshape(-1)[at]
    high = (indices >> 16).astype(np.uint8) if codes.d_sae > _NARROW else None
    return Packed((indices & 0xFFFF).astype(np.uint16), high, half, overflow, codes.d_sae)


def stored_values(values: np.ndarray) -> np.ndarray:
    """Values as a store returns them: eleven significant bits; a value above zero stays so."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    half = np.where((values > 0) & (half == 0), _LEAST, half)
    stored = half.astype(np.float32)
    if (big := np.isinf(half)).any():
        bits = values[big].view(np.uint32)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint32(0x1FFF)
        stored[big] = bits.view(np.float32)
    return stored
