"""SparseCodes: which k features fire at each position, and how strongly.

Encoders make these codes; decoders, stores and every application read them. How codes are computed
is in `topk.py`, and how they are stored is in `codec.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import register_pytree_node

from qwen_scope_lens.pages import Shaded, lines_html, shaded_html
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["SparseCodes"]

SHOWN = 12
"""How many positions a notebook shows."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseCodes(View):
    """The k features of each position: `values [.., k]` and `indices [.., k]` (int32).

    `d_sae` is the number of features that the SAE has. The entries of a position are ordered by
    descending value, and equal values by ascending index. A position with fewer than k positive
    pre-activations ends in *padding*, with value 0 and index 0. Padding does not mean that feature
    0 fires: `active` tells the two apart; `l0`, `to_dense` and `to_scipy_csr` leave padding out.
    """

    values: torch.Tensor
    indices: torch.Tensor
    d_sae: int

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.ndim == 0:
            raise ValueError(
                f"values and indices must have one shape [.., k]; found {tuple(self.values.shape)}"
                f" and {tuple(self.indices.shape)}"
            )
        if self.indices.is_floating_point() or self.indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers; found {self.indices.dtype}")
        if self.indices.dtype != torch.int32:
            object.__setattr__(self, "indices", self.indices.to(torch.int32))

    @property
    def k(self) -> int:
        """The number of entries per position, padding included."""
        return self.values.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions, without the last axis of k entries."""
        return self.values.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def active(self) -> torch.Tensor:
        """Which entries are features that fire, as opposed to padding. bool `[.., k]`"""
        return self.values > 0

    @property
    def l0(self) -> torch.Tensor:
        """The number of features that fire at each position. int `[..]`"""
        return self.active.sum(-1)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("the codes of a single position have no length")
        return self.shape[0]

    def __getitem__(self, key: Any) -> SparseCodes:
        """Index the positions, as in a tensor of shape `self.shape`. All k entries are kept."""
        parts = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in parts):
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            free = len(self.shape) - sum(_width(p) for p in parts if p is not Ellipsis)
            parts = (*parts[:at], *[slice(None)] * free, *parts[at + 1 :])
        if sum(_width(p) for p in parts) > len(self.shape):
            raise IndexError(
                f"too many indices for codes of shape {tuple(self.shape)}: the k entries of a "
                "position are not indexed here; use .values and .indices"
            )
        return SparseCodes(self.values[parts], self.indices[parts], self.d_sae)

    def reshape(self, *shape: int) -> SparseCodes:
        """The same positions in another shape. `[.., k] -> [*shape, k]`"""
        full = (*shape, self.k)
        return SparseCodes(self.values.reshape(full), self.indices.reshape(full), self.d_sae)

    def flatten(self) -> SparseCodes:
        """All positions in one row. `[.., k] -> [n, k]`"""
        return self.reshape(self.shape.numel())

    @staticmethod
    def cat(codes: Sequence[SparseCodes], dim: int = 0) -> SparseCodes:
        """Join along one dimension of the positions. Codes with a smaller k are padded."""
        if not codes:
            raise ValueError("nothing to concatenate: expected at least one SparseCodes")
        widths = {c.d_sae for c in codes}
        if len(widths) > 1:
            raise ValueError(f"codes of different SAEs: d_sae {sorted(widths)}; expected one")
        dims = len(codes[0].shape)
        if not -dims <= dim < dims:
            raise IndexError(f"dim {dim} is out of range for codes of shape {codes[0].shape}")
        k = max(c.k for c in codes)
        grown = [c._padded(k) for c in codes]
        dim %= dims
        return SparseCodes(
            torch.cat([c.values for c in grown], dim),
            torch.cat([c.indices for c in grown], dim),
            codes[0].d_sae,
        )

    def mask(self, positions: torch.Tensor) -> SparseCodes:
        """Empty every position where `positions` (bool, `[..]`) is False. The shape stays the same.

        To drop those positions instead, use `codes[positions]`.
        """
        if positions.dtype != torch.bool or positions.shape != self.shape:
            raise ValueError(
                f"positions must be bool of shape {tuple(self.shape)}; "
                f"found {positions.dtype} {tuple(positions.shape)}"
            )
        drop = ~positions.to(self.device).unsqueeze(-1)
        return SparseCodes(
            self.values.masked_fill(drop, 0), self.indices.masked_fill(drop, 0), self.d_sae
        )

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseCodes:
        """Move to a device, or give the values another dtype. Indices stay int32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return SparseCodes(
            self.values.to(device=device, dtype=dtype), self.indices.to(device=device), self.d_sae
        )

    def detach(self) -> SparseCodes:
        """The same codes without a gradient."""
        return SparseCodes(self.values.detach(), self.indices, self.d_sae)

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense activations `[.., d_sae]`, zero where a feature does not fire.

        They take d_sae / k times the memory.
        """
        values = self.values if dtype is None else self.values.to(dtype)
        dense = values.new_zeros((*self.shape, self.d_sae))
        # Values are added: padding has index 0 and must not overwrite feature 0 when that fires.
        return dense.scatter_add(-1, self.indices.long(), values)

    @staticmethod
    def from_dense(dense: torch.Tensor, k: int) -> SparseCodes:
        """The k largest positive entries of `[.., d_sae]`. Of equal ones the lower index wins."""
        # Only a stable sort guarantees the order of equal values.
        values, indices = torch.sort(dense, dim=-1, descending=True, stable=True)
        values = values[..., :k].relu()
        indices = indices[..., :k].to(torch.int32).masked_fill(values <= 0, 0)
        return SparseCodes(values, indices, dense.shape[-1])

    def to_scipy_csr(self) -> csr_matrix:
        """A sparse matrix: a row per position (flattened), a column per feature, no padding."""
        import numpy as np
        from scipy.sparse import csr_matrix

        flat = self.flatten().detach().to("cpu", torch.promote_types(self.dtype, torch.float32))
        active = flat.active
        starts = np.concatenate([[0], active.sum(-1).cumsum(0).numpy()])
        matrix = csr_matrix(
            (flat.values[active].numpy(), flat.indices[active].numpy(), starts),
            shape=(len(flat), self.d_sae),
        )
        matrix.sort_indices()
        return matrix

    def table(self, most: int | None = None) -> Table:
        """One row per active entry; with `most`, of the first `most` positions only.

        In codes `[.., k]` of several dimensions, positions are counted through, as in `flatten`.
        """
        flat = self.flatten().detach()
        some = (flat if most is None else flat[:most]).to("cpu")
        position, entry = some.active.nonzero(as_tuple=True)
        return Table.of(
            ("position", "feature", "activation"),
            zip(
                position.tolist(),
                some.indices[position, entry].tolist(),
                some.values[position, entry].float().tolist(),
                strict=True,
            ),
            above=(repr(self),),
            more=int(flat.active.sum()) - len(position),
            heat=("activation",),
        )

    def _repr_html_(self) -> str:
        """The features of the first positions, shaded by their activations."""
        some = self.flatten()[:SHOWN].detach().to("cpu", torch.float32)
        most = float(some.values.max()) if some.values.numel() else 0.0
        rows = [
            (
                f"position {i}: {n} features",
                [
                    Shaded(f" {feature} ", value / most, f"{value:.4g}")
                    for feature, value in zip(
                        some.indices[i, :n].tolist(), some.values[i, :n].tolist(), strict=True
                    )
                ],
            )
            for i, n in enumerate(some.l0.tolist())
        ]
        return lines_html((repr(self),)) + shaded_html(rows)

    def __eq__(self, other: object) -> bool:
        """Whether shape, d_sae, dtype, device, indices and values are the same, bit for bit."""
        if not isinstance(other, SparseCodes):
            return NotImplemented
        return (
            self.d_sae == other.d_sae
            and self.dtype == other.dtype
            and self.device == other.device
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        where = "" if self.device.type == "cpu" else f", {self.device}"
        return f"SparseCodes({list(self.shape)}, k={self.k} of {self.d_sae}, {dtype}{where})"

    def _padded(self, k: int) -> SparseCodes:
        if k == self.k:
            return self
        pad = (0, k - self.k)
        return SparseCodes(
            torch.nn.functional.pad(self.values, pad),
            torch.nn.functional.pad(self.indices, pad),
            self.d_sae,
        )


def _flattened(codes: SparseCodes) -> tuple[list[Any], int]:
    return [codes.values, codes.indices], codes.d_sae


def _unflattened(parts: Iterable[Any], d_sae: int) -> SparseCodes:
    codes = object.__new__(SparseCodes)  # torch also puts other things than tensors here
    for name, value in zip(("values", "indices"), parts, strict=True):
        object.__setattr__(codes, name, value)
    object.__setattr__(codes, "d_sae", d_sae)
    return codes


# Functions that `torch.func.vmap`, `grad` and the like transform may now take and return codes.
register_pytree_node(SparseCodes, _flattened, _unflattened)


def _width(part: Any) -> int:
    """The number of dimensions of the positions that one part of an index uses up."""
    if part is None:
        return 0
    if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 1
